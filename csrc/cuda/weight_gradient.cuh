// SPDX-License-Identifier: Apache-2.0
// weight_gradient: sums over tokens of rank times wide activation.
//
//   sums[split][n][c][i] = f * sum_{t in split} v[t, n, c] * x'[t, n*w + i]      c < r + h;  f carries a scaling
//
// U and g give dB and dBg; dH and x give dA and dAg: the two sides of one launch. reduce_kernel
// then adds the splits in their order and writes the gradients: no atomics, so the result depends
// on the shape and the number of splits alone.
//
// A block owns 64 columns of x, kRanks ranks (32 where there are no more, or 64) and one split of
// the tokens; each of its 8 warps 16 of the ranks and as many columns as are left to it. x comes 32
// tokens at a time through a ring of kStages tiles (cp.async), each element once per kRanks ranks;
// the ranks through two buffers of bfloat16 pieces.
#pragma once

#include "fragments.cuh"

namespace gralora::cuda {

template <class X, int kRankCount>
struct GradientTile {
  static constexpr int kRanks = kRankCount, kRankGroups = kRanks / 16;
  static constexpr int kColumns = 64, kWarpColumns = kColumns * kRankGroups / kWarps, kDepth = 32, kStages = 4;
  static constexpr int kBlocks =
      sizeof(X) == 4 && kRanks == 64 ? 1 : 2;  // a multiprocessor: two would spill registers there
  static constexpr int kRankPieces = 3;
  static constexpr int kPitch = kColumns + 16 / sizeof(X), kRankPitch = kRanks + 8;
  struct Shared {
    X x[kStages][kDepth][kPitch];
    bf16 ranks[2][kRankPieces][kDepth][kRankPitch];
  };
};

template <class X>
struct GradientSide {
  ActivationView<const X> x;
  Ranks ranks;
  int64_t w;    // of a block
  float* sums;  // nullptr: not wanted
  float scale;
  Mask mask;
  int column_tiles = 0, rank_tiles = 0;  // of a block of the grid of blocks

  __host__ __device__ int tiles() const { return sums == nullptr ? 0 : ranks.k * column_tiles * rank_tiles; }
};

template <class X>
struct GradientSides {
  GradientSide<X> side[2];
};

template <class X, int kRanks>
__global__ void __launch_bounds__(kThreads, GradientTile<X, kRanks>::kBlocks)
    weight_gradient_kernel(GradientSides<X> sides, int splits) {
  using Tile = GradientTile<X, kRanks>;
  constexpr int kDepth = Tile::kDepth, kVector = 16 / sizeof(X);
  typename Tile::Shared& shared = *dynamic_shared<typename Tile::Shared>();
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int first_tiles = sides.side[0].tiles();
  const GradientSide<X>& side = sides.side[int(blockIdx.x) >= first_tiles];
  const Ranks& ranks = side.ranks;
  int tile = int(blockIdx.x) - (int(blockIdx.x) >= first_tiles ? first_tiles : 0);
  const int all_ranks = ranks.r + ranks.h;
  const int rank0 = tile % side.rank_tiles * Tile::kRanks;
  tile /= side.rank_tiles;
  const int column0 = tile % side.column_tiles * Tile::kColumns, w = int(side.w);
  const int n = tile / side.column_tiles, split = blockIdx.y;
  const int64_t block_column = int64_t(n) * w;
  const int64_t chunks = (ranks.T + kDepth - 1) / kDepth;
  const int first = int(chunks * split / splits), last = int(chunks * (split + 1) / splits);

  const auto load_x = [&](int stage, int chunk) {
    if (chunk < last)
      for (int i = tid; i < kDepth * (Tile::kColumns / kVector); i += kThreads) {
        const int m = i / (Tile::kColumns / kVector), c = i % (Tile::kColumns / kVector) * kVector;
        const int64_t t = int64_t(chunk) * kDepth + m;
        const int left = w - column0 - c;
        const bool inside = t < ranks.T && left > 0;
        const X* from = side.x.data + t * side.x.stride + block_column + column0 + c;
        X* to = &shared.x[stage][m][c];
        if (side.x.vectors)
          cp_async_16(to, inside ? from : side.x.data, inside ? 16 : 0);
        else
          for (int e = 0; e < kVector; e++) to[e] = inside && e < left ? load_global(from + e) : from_float<X>(0.0f);
      }
    cp_async_commit();
  };
  constexpr int kHeld = kDepth * Tile::kRanks / kThreads;
  float held[kHeld];
  const auto load_ranks = [&](int chunk) {
#pragma unroll
    for (int q = 0; q < kHeld; q++) {
      const int i = tid + q * kThreads, c = rank0 + i % Tile::kRanks;
      const int64_t t = int64_t(chunk) * kDepth + i / Tile::kRanks;
      held[q] = chunk < last && t < ranks.T && c < all_ranks ? ranks.get(t, n, c) : 0.0f;
    }
  };
  const auto store_ranks = [&](int buffer) {
#pragma unroll
    for (int q = 0; q < kHeld; q++) {
      const int i = tid + q * kThreads;
      bf16 piece[Tile::kRankPieces];
      split_float(held[q], piece);
#pragma unroll
      for (int p = 0; p < Tile::kRankPieces; p++)
        shared.ranks[buffer][p][i / Tile::kRanks][i % Tile::kRanks] = piece[p];
    }
  };

  const int warp_rank = warp % Tile::kRankGroups * 16, warp_column = warp / Tile::kRankGroups * Tile::kWarpColumns;
  float acc[Tile::kWarpColumns / 8][4] = {};
  for (int stage = 0; stage < Tile::kStages - 1; stage++) load_x(stage, first + stage);
  load_ranks(first);
  store_ranks(0);
  for (int chunk = first; chunk < last; chunk++) {
    const int step = chunk - first, stage = step % Tile::kStages, buffer = step % 2;
    cp_async_wait<Tile::kStages - 2>();
    sync_block();  // this stage has landed for all, and all are done with the one that is filled next
    load_x((step + Tile::kStages - 1) % Tile::kStages, chunk + Tile::kStages - 1);
    load_ranks(chunk + 1);
    if (side.mask.seed != nullptr) {
      drop_tile(side.mask, &shared.x[stage][0][0], Tile::kPitch, kDepth, Tile::kColumns, int64_t(chunk) * kDepth,
                block_column + column0, tid, kThreads);
      sync_block();
    }
#pragma unroll
    for (int k0 = 0; k0 < kDepth; k0 += 16) {
      uint32_t a[Tile::kRankPieces][4];
#pragma unroll
      for (int p = 0; p < Tile::kRankPieces; p++)
        load_rows_transposed(a[p], &shared.ranks[buffer][p][k0][warp_rank], Tile::kRankPitch, lane);
#pragma unroll
      for (int c = 0; c < Tile::kWarpColumns; c += 16) {
        uint32_t left[kPieces<X>][2], right[kPieces<X>][2];
        load_columns(left, right, &shared.x[stage][k0][warp_column + c], Tile::kPitch, lane);
        multiply(acc[c / 8], a, left);
        multiply(acc[c / 8 + 1], a, right);
      }
    }
    store_ranks(1 - buffer);
  }

#pragma unroll
  for (int c = 0; c < Tile::kWarpColumns / 8; c++)
#pragma unroll
    for (int v = 0; v < 4; v++) {
      const int rank = rank0 + warp_rank + lane / 4 + v / 2 * 8;
      const int column = column0 + warp_column + c * 8 + lane % 4 * 2 + v % 2;
      if (rank < all_ranks && column < w)
        store_global(side.sums + ((int64_t(split) * ranks.k + n) * all_ranks + rank) * w + column,
                     side.scale * acc[c][v]);
    }
}

}  // namespace gralora::cuda
