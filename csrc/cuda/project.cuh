// SPDX-License-Identifier: Apache-2.0
// project: from a wide activation to its latents, before the block exchange (see Latents).
//
//   latents[split][t][n][c]     = f * sum_{i in split} x'[t, n*w + i] * P[n][i, c]      c < r
//   latents[split][t][n][r + c] = f * sum_{i in split} x'[t, n*w + i] * G[n][i, c]      c < h
//
// Forward: x, A, Ag^T. Backward: g, B^T, Bg. w = width/k; f carries the scaling and the 1/(1-p) of
// dropout.
//
// A block owns 128 tokens, one n, `kRanks` ranks and one split of the w columns; a warp owns 16
// tokens. x goes through a ring of kStages chunks of 128 bytes a row (cp.async), each read once
// per group of ranks; P through two buffers of bfloat16 pieces, converted once a block. Both are
// read by ldmatrix from rows whose length is an odd multiple of 16 bytes, or a float x by 8-byte
// loads from rows of 160 bytes: no bank conflicts. Sums are taken in the order of i, in registers,
// and each chunk's is added to a total that rounds to nearest (promote): the result depends on
// nothing but the shape and the number of splits.
#pragma once

#include "fragments.cuh"
#include "latents.cuh"
#include "pipeline.cuh"

namespace gralora::cuda {

template <class X, class P, int kRanks_>
struct ProjectTile {
  static constexpr int kRanks = kRanks_;
  static constexpr int kDepth = 128 / sizeof(X);                                  // columns of x in a chunk
  static constexpr int kPitch = kDepth + (sizeof(X) == 4 ? 32 : 16) / sizeof(X);  // from a row of x to the next
  static constexpr int kFactorPitch = kRanks + 8;
  static constexpr int kFactorPieces = kPieces<P>;
  // Three, where two blocks still fit into the 163 KiB of a multiprocessor of 8.0
  static constexpr int kStages = kFactorPieces * kDepth * kRanks > 4096 ? 2 : 3;
  // Groups of four elements of P, and how many of them a thread converts
  static constexpr int kFours = kDepth * kRanks / 4, kHeld = (kFours + kThreads - 1) / kThreads;
  struct Shared {
    X x[kStages][kTokens][kPitch];
    bf16 factor[2][kFactorPieces][kDepth][kFactorPitch];
  };
  static_assert(sizeof(Shared) <= 99 * 1024);
  static_assert(kFours % kThreads == 0 || kFours < kThreads);
};

// One of the products of a launch, all of which have the same numbers of blocks, ranks, tokens and
// splits: in backward g and, where forward did not keep U, x.
template <class X, class P>
struct ProjectSide {
  ActivationView<const X> x;
  FactorPair<P> factor;
  Latents latents;
  float scale;
  Mask mask;
};
template <class X, class P>
struct ProjectSides {
  ProjectSide<X, P> side[2];
};

// A block of the grid at work: latents of the tokens `rows` of block n, from the chunks before
// `last`, for the ranks from rank0 on.
template <class Tile, class X, class P>
struct ProjectBlock {
  typename Tile::Shared& shared;
  const ProjectSide<X, P>& side;
  RowRange rows;
  int n, rank0, last;
  float held[Tile::kHeld][4];  // the next chunk of P on its way from memory to `factor`

  __device__ __forceinline__ void load_x(int chunk) {
    if (chunk < last)
      load_tile<kTokens, Tile::kDepth>(&shared.x[chunk % Tile::kStages][0][0], Tile::kPitch, side.x, rows,
                                       columns(chunk));
    cp_async_commit();
  }

  __device__ __forceinline__ void load_operand(int chunk) {
#pragma unroll
    for (int q = 0; q < Tile::kHeld; q++) {
      const FourAt at = four(q);
      if (exists(q) && chunk < last)
        side.factor.get_four(n, 0, {chunk * Tile::kDepth + at.column, rank0 + at.rank}, held[q]);
    }
  }
  __device__ __forceinline__ void store_operand(int chunk) {
    bf16(&factor)[Tile::kFactorPieces][Tile::kDepth][Tile::kFactorPitch] = shared.factor[chunk % 2];
#pragma unroll
    for (int q = 0; q < Tile::kHeld; q++) {
      const FourAt at = four(q);
      if (exists(q))
        store_four<Tile::kFactorPieces>(&factor[0][at.column][at.rank], Tile::kDepth * Tile::kFactorPitch,
                                        side.factor.along_ranks() ? 1 : Tile::kFactorPitch, held[q]);
    }
  }

  __device__ __forceinline__ void drop(int chunk) {
    drop_tile(side.mask, &shared.x[chunk % Tile::kStages][0][0], Tile::kPitch, kTokens, Tile::kDepth, rows.first,
              columns(chunk).in_row(), threadIdx.x, kThreads);
  }

  // Of a warp: its 16 tokens by all ranks of the block
  __device__ __forceinline__ void multiply_chunk(int chunk, float (&total)[Tile::kRanks / 8][4]) const {
    constexpr int kSteps = Tile::kDepth / 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t a[kSteps][kPieces<X>][4];
#pragma unroll
    for (int step = 0; step < kSteps; step++)
      load_rows(a[step], &shared.x[chunk % Tile::kStages][warp * 16][step * 16], Tile::kPitch, lane);
#pragma unroll
    for (int c = 0; c < Tile::kRanks; c += 16) {
      float sum[2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        uint32_t left[Tile::kFactorPieces][2], right[Tile::kFactorPieces][2];
        load_pieces(left, right, &shared.factor[chunk % 2][0][step * 16][c], Tile::kDepth * Tile::kFactorPitch,
                    Tile::kFactorPitch, lane);
        multiply<kFloatLevel>(sum[0], a[step], left);
        multiply<kFloatLevel>(sum[1], a[step], right);
      }
      promote(total[c / 8], sum[0]), promote(total[c / 8 + 1], sum[1]);
    }
  }

  __device__ __forceinline__ void store(int split, const float (&total)[Tile::kRanks / 8][4]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int c = 0; c < Tile::kRanks / 8; c++)
#pragma unroll
      for (int v = 0; v < 4; v++) {
        const int64_t t = rows.first + warp * 16 + lane / 4 + v / 2 * 8;
        const int rank = rank0 + c * 8 + lane % 4 * 2 + v % 2;
        if (t < rows.last && rank < side.factor.r + side.factor.h)
          store_global(side.latents.partial(split, t, n) + rank, side.scale * total[c][v]);
      }
  }

 private:
  __device__ __forceinline__ TileColumns columns(int chunk) const {
    return {int64_t(n) * side.factor.w, chunk * Tile::kDepth, side.factor.w};
  }
  __device__ __forceinline__ FourAt four(int q) const {
    return side.factor.template four_of_tile<Tile::kDepth, Tile::kRanks>(threadIdx.x + q * kThreads);
  }
  __device__ __forceinline__ static bool exists(int q) { return threadIdx.x + q * kThreads < Tile::kFours; }
};

template <class X, class P, int kRanks>
__global__ void __launch_bounds__(kThreads, 2) project_kernel(ProjectSides<X, P> sides) {
  using Tile = ProjectTile<X, P, kRanks>;
  const FactorPair<P>& factor = sides.side[0].factor;
  const int k = sides.side[0].latents.k, rank_groups = (factor.r + factor.h + kRanks - 1) / kRanks;
  // Groups of ranks first: those of one tile of x run together, and all but one find it in L2.
  const int rank0 = blockIdx.x % rank_groups * kRanks, split = blockIdx.z;
  const ProjectSide<X, P>& side = sides.side[int(blockIdx.y) >= k];
  const int splits = side.latents.splits, chunks = (side.factor.w + Tile::kDepth - 1) / Tile::kDepth;
  const int first = int(int64_t(chunks) * split / splits), last = int(int64_t(chunks) * (split + 1) / splits);
  ProjectBlock<Tile, X, P> block{*dynamic_shared<typename Tile::Shared>(),
                                 side,
                                 side.latents.rows(blockIdx.x / rank_groups),
                                 int(blockIdx.y) % k,
                                 rank0,
                                 last,
                                 {}};

  float total[kRanks / 8][4] = {};
  multiply_chunks<Tile::kStages>(block, first, side.mask.seed != nullptr, total);
  block.store(split, total);
}

}  // namespace gralora::cuda
