// SPDX-License-Identifier: Apache-2.0
// A parameter of the adapter as a factor of a product: read in groups of four along its unit
// stride, converted to bfloat16 pieces, and laid down in shared memory.
#pragma once

#include "geometry.cuh"

namespace gralora::cuda {

// A parameter [blocks, w, ranks] of any strides; data == nullptr: absent. vectors: along the
// dimension of stride 1, each four elements whose index is a multiple of 4 can be loaded together.
template <class P>
struct Factor {
  const P* data;
  int64_t block_stride, column_stride, rank_stride;
  bool vectors;

  __device__ const P* at(int64_t block, int64_t column, int64_t rank) const {
    return data + block * block_stride + column * column_stride + rank * rank_stride;
  }
  __device__ float get(int64_t block, int64_t column, int64_t rank) const {
    return to_float(load_global(at(block, column, rank)));
  }
  __device__ void get_four(int64_t block, int64_t column, int64_t rank, float (&value)[4]) const {
    using Four = std::conditional_t<sizeof(P) == 4, uint4, uint2>;
    const Four four = load_global(reinterpret_cast<const Four*>(at(block, column, rank)));
    P element[4];
    memcpy(static_cast<void*>(element), &four, sizeof four);  // a cast of pointers would be an alias of another type
#pragma unroll
    for (int e = 0; e < 4; e++) value[e] = to_float(element[e]);
  }
};

// Four elements along a factor's unit stride: of columns from `column`, or of ranks from `rank`
struct FourAt {
  int column, rank;
};

// Ranks [first_rank, first_rank + r) of each block of a parameter, then the h ranks of the general
// part, as one factor of r + h ranks; w columns a block.
template <class P>
struct FactorPair {
  Factor<P> block, general;
  int w, r, h;

  __device__ bool along_ranks() const { return block.rank_stride == 1; }

  // Group `group` of a tile of kColumns x kRanks
  template <int kColumns, int kRanks>
  __device__ FourAt four_of_tile(int group) const {
    if (along_ranks()) return {group / (kRanks / 4), group % (kRanks / 4) * 4};
    return {group % (kColumns / 4) * 4, group / (kColumns / 4)};
  }

  // Zeros beyond the columns and the ranks
  __device__ void get_four(int n, int first_rank, FourAt at, float (&value)[4]) const {
    const bool along = along_ranks(),
               inside = along ? at.rank + 4 <= r && at.column < w : at.rank < r && at.column + 4 <= w;
    if (block.vectors && inside && (!along || first_rank % 4 == 0))
      return block.get_four(n, at.column, first_rank + at.rank, value);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int column = at.column + (along ? 0 : e), rank = at.rank + (along ? e : 0);
      value[e] = column >= w || rank >= r + h ? 0.0f
                 : rank < r                   ? block.get(n, column, first_rank + rank)
                                              : general.get(n, column, rank - r);
    }
  }
};

// Four values as pieces: element e of piece p goes to to[p * piece + e * step].
template <int pieces>
__device__ __forceinline__ void store_four(bf16* to, int piece, int step, const float (&value)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    bf16 of_value[pieces];
    split_float(value[e], of_value);
#pragma unroll
    for (int p = 0; p < pieces; p++) to[p * piece + e * step] = of_value[p];
  }
}

}  // namespace gralora::cuda
