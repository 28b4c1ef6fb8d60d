// SPDX-License-Identifier: Apache-2.0
// The tiles that all tensor-core kernels share, and the plain structs that they take.
#pragma once

#include "mask.cuh"
#include "plan.h"

namespace gralora::cuda {

constexpr int kWarps = kTokens / 16;
constexpr int kThreads = 32 * kWarps;

// An activation [T, width] whose rows lie `stride` elements apart and are contiguous. vectors: rows
// and blocks begin at multiples of 16 bytes, and a block is whole vectors of 16 bytes.
template <class X>
struct ActivationView {
  X* data;
  int64_t stride;
  bool vectors;
};

// A parameter [blocks, rows, columns] of any strides; data == nullptr: absent. vectors: along the
// dimension of stride 1, each four elements whose index is a multiple of 4 can be loaded together.
template <class P>
struct Factor {
  const P* data;
  int64_t block_stride, row_stride, column_stride;
  bool vectors;

  __device__ float get(int64_t block, int64_t row, int64_t column) const {
    return to_float(load_global(data + block * block_stride + row * row_stride + column * column_stride));
  }
  __device__ void get_four(int64_t block, int64_t row, int64_t column, float (&value)[4]) const {
    using Four = std::conditional_t<sizeof(P) == 4, uint4, uint2>;
    const P* at = data + block * block_stride + row * row_stride + column * column_stride;
    const Four four = load_global(reinterpret_cast<const Four*>(at));
    P element[4];
    memcpy(static_cast<void*>(element), &four,
           sizeof four);  // not by a cast of pointers: one type must not alias another
#pragma unroll
    for (int e = 0; e < 4; e++) value[e] = to_float(element[e]);
  }
};

// 16 bytes of shared memory, which lie at a multiple of 16.
template <class T>
__device__ __forceinline__ uint4 shared_vector(const T* from) {
  uint4 vector;
  memcpy(&vector, __builtin_assume_aligned(from, 16), sizeof vector);
  return vector;
}

// A tile's rows [first, last), at most kTokens.
struct RowRange {
  int64_t first, last;
};

// The ranks of T tokens, in one of two forms:
//   kept      [T, k*r + h]: U (or dH), then the general part, as forward leaves them for backward
//   partial   [splits][T][k][r + h]: sums over chunks of a width by block, before the block exchange; whoever reads them adds
//             the splits (and, for the general part, the blocks) in their order
struct Ranks {
  static constexpr bool kAllPieces = false;
  float* data;
  int64_t T;
  int k, r, h, splits;  // splits == 0: kept
  float* u;  // where the ranks are written for backward as [T, k*r + h], by their first reader; nullptr: nowhere

  __device__ float* at(int split, int64_t t, int block) const {
    return data + ((split * T + t) * k + block) * int64_t(r + h);
  }
  __device__ RowRange rows(int tile) const {
    const int64_t first = int64_t(tile) * kTokens;
    return {first, first + kTokens < T ? first + kTokens : T};
  }
  __device__ int first_rank(int64_t) const { return 0; }
  // Rank c of those that meet output block j: c < r after the exchange,
  // U[t, j, c] = H[t, c / rb, j*rb + c % rb]; then h.
  __device__ float get(int64_t t, int j, int c) const {
    if (splits == 0) return load_global(data + t * (int64_t(k) * r + h) + (c < r ? j : k - 1) * r + c);
    float sum = 0.0f;
    const int rb = r / k;
    if (c < r) {
      for (int s = 0; s < splits; s++) sum += load_global(at(s, t, c / rb) + j * rb + c % rb);
    } else {
      for (int s = 0; s < splits; s++)
        for (int n = 0; n < k; n++) sum += load_global(at(s, t, n) + c);
    }
    return sum;
  }
  __device__ void keep(int64_t t, int j, int c, float value) const {
    if (u == nullptr || (c >= r && j > 0)) return;
    store_global(u + t * (int64_t(k) * r + h) + (c < r ? j : k - 1) * r + c, value);
  }
};

// Rows of W as tokens: those of output block j meet, in column block n, the ranks n*rb .. of B_j
// and j*rb .. of A_n.
template <class P>
struct OutputRanks {
  static constexpr bool kAllPieces = true;
  Factor<P> B, general;  // [k, r, M/k], [M, h]
  int64_t block_rows;    // M/k
  int tiles_per_block, rb, h;

  __device__ RowRange rows(int tile) const {
    const int64_t start = tile / tiles_per_block * block_rows, first = int64_t(tile % tiles_per_block) * kTokens;
    return {start + first, start + (first + kTokens < block_rows ? first + kTokens : block_rows)};
  }
  __device__ int first_rank(int64_t row) const { return int(row / block_rows) * rb; }
  __device__ float get(int64_t row, int n, int c) const {
    if (c >= rb) return general.get(0, row, c - rb);
    return B.get(row / block_rows, n * rb + c, row % block_rows);
  }
  __device__ void keep(int64_t, int, int, float) const {}
};

}  // namespace gralora::cuda
