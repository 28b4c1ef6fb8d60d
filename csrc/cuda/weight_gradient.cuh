// SPDX-License-Identifier: Apache-2.0
// weight_gradient: sums over tokens of latent times wide activation.
//
//   sums[split][n][c][i] = f * sum_{t in split} v[t, n, c] * x'[t, n*w + i]      c < r + h
//
// f carries a scaling. U and g give dB and dBg; dH and x give dA and dAg: the two sides of one
// launch, or of a launch each where g and x differ in dtype. reduce_kernel then adds the splits in
// their order and writes the gradients: no atomics, so the result depends on the shape and the
// number of splits alone.
//
// A block owns 64 columns of x, kRanks ranks (32 where there are no more, or 64) and one split of
// the tokens; each of its 8 warps 16 of the ranks and as many columns as are left to it. x comes
// 32 tokens at a time through a ring of kStages chunks (cp.async), each element once per kRanks
// ranks; the latents through two buffers of bfloat16 pieces. Each chunk's sum is added to a total
// that rounds to nearest (promote).
#pragma once

#include "fragments.cuh"
#include "latents.cuh"
#include "pipeline.cuh"

namespace gralora::cuda {

template <class X, int kRankCount>
struct GradientTile {
  static constexpr int kRanks = kRankCount, kRankGroups = kRanks / 16;
  static constexpr int kColumns = 64, kWarpColumns = kColumns * kRankGroups / kWarps, kDepth = 32, kStages = 4;
  // Of a multiprocessor: two would spill registers there
  static constexpr int kBlocks = sizeof(X) == 4 && kRanks == 64 ? 1 : 2;
  static constexpr int kLatentPieces = 3;
  static constexpr int kPitch = kColumns + 16 / sizeof(X), kLatentPitch = kRanks + 8;
  static constexpr int kHeld = kDepth * kRanks / kThreads;  // latents that a thread converts
  struct Shared {
    X x[kStages][kDepth][kPitch];
    bf16 latents[2][kLatentPieces][kDepth][kLatentPitch];
  };
};

template <class X>
struct GradientSide {
  ActivationView<const X> x;
  Latents latents;
  int w;        // of a block
  float* sums;  // nullptr: not wanted
  float scale;
  Mask mask;
  int column_tiles = 0, rank_tiles = 0;  // of a block of the grid of blocks

  __host__ __device__ int tiles() const { return sums == nullptr ? 0 : latents.k * column_tiles * rank_tiles; }
};

template <class X>
struct GradientSides {
  GradientSide<X> side[2];
};

// A block of the grid at work: sums over the chunks of tokens before `last`, of columns from
// column0 on of block n, for the ranks from rank0 on.
template <class Tile, class X>
struct GradientBlock {
  typename Tile::Shared& shared;
  const GradientSide<X>& side;
  int n, rank0, column0, last;
  float held[Tile::kHeld];  // the next chunk of latents on their way from memory to their buffer

  __device__ __forceinline__ void load_x(int chunk) {
    if (chunk < last)
      load_tile<Tile::kDepth, Tile::kColumns>(&shared.x[chunk % Tile::kStages][0][0], Tile::kPitch, side.x,
                                              {first_token(chunk), side.latents.T}, columns());
    cp_async_commit();
  }

  __device__ __forceinline__ void load_operand(int chunk) {
#pragma unroll
    for (int q = 0; q < Tile::kHeld; q++) {
      const int i = threadIdx.x + q * kThreads, rank = rank0 + i % Tile::kRanks;
      const int64_t t = first_token(chunk) + i / Tile::kRanks;
      held[q] = chunk < last && t < side.latents.T && rank < ranks() ? side.latents.get(t, n, rank) : 0.0f;
    }
  }
  __device__ __forceinline__ void store_operand(int chunk) {
#pragma unroll
    for (int q = 0; q < Tile::kHeld; q++) {
      const int i = threadIdx.x + q * kThreads;
      bf16 piece[Tile::kLatentPieces];
      split_float(held[q], piece);
#pragma unroll
      for (int p = 0; p < Tile::kLatentPieces; p++)
        shared.latents[chunk % 2][p][i / Tile::kRanks][i % Tile::kRanks] = piece[p];
    }
  }

  __device__ __forceinline__ void drop(int chunk) {
    drop_tile(side.mask, &shared.x[chunk % Tile::kStages][0][0], Tile::kPitch, Tile::kDepth, Tile::kColumns,
              first_token(chunk), columns().in_row(), threadIdx.x, kThreads);
  }

  // Of a warp: its 16 ranks by its columns
  __device__ __forceinline__ void multiply_chunk(int chunk, float (&total)[Tile::kWarpColumns / 8][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < Tile::kWarpColumns; c += 16) {
      float sum[2][4] = {};
#pragma unroll
      for (int k0 = 0; k0 < Tile::kDepth; k0 += 16) {
        uint32_t a[Tile::kLatentPieces][4], left[kPieces<X>][2], right[kPieces<X>][2];
#pragma unroll
        for (int p = 0; p < Tile::kLatentPieces; p++)
          load_rows_transposed(a[p], &shared.latents[chunk % 2][p][k0][warp_rank()], Tile::kLatentPitch, lane);
        load_columns(left, right, &shared.x[chunk % Tile::kStages][k0][warp_column() + c], Tile::kPitch, lane);
        multiply<kFloatLevel>(sum[0], a, left);
        multiply<kFloatLevel>(sum[1], a, right);
      }
      promote(total[c / 8], sum[0]), promote(total[c / 8 + 1], sum[1]);
    }
  }

  __device__ __forceinline__ void store(int split, const float (&total)[Tile::kWarpColumns / 8][4]) const {
    const int lane = threadIdx.x % 32;
    float* sums = side.sums + (int64_t(split) * side.latents.k + n) * ranks() * side.w;
#pragma unroll
    for (int c = 0; c < Tile::kWarpColumns / 8; c++)
#pragma unroll
      for (int v = 0; v < 4; v++) {
        const int rank = rank0 + warp_rank() + lane / 4 + v / 2 * 8;
        const int column = column0 + warp_column() + c * 8 + lane % 4 * 2 + v % 2;
        if (rank < ranks() && column < side.w)
          store_global(sums + int64_t(rank) * side.w + column, side.scale * total[c][v]);
      }
  }

 private:
  __device__ __forceinline__ int ranks() const { return side.latents.r + side.latents.h; }
  __device__ __forceinline__ static int64_t first_token(int chunk) { return int64_t(chunk) * Tile::kDepth; }
  __device__ __forceinline__ TileColumns columns() const { return {int64_t(n) * side.w, column0, side.w}; }
  __device__ __forceinline__ static int warp_rank() { return int(threadIdx.x) / 32 % Tile::kRankGroups * 16; }
  __device__ __forceinline__ static int warp_column() {
    return int(threadIdx.x) / 32 / Tile::kRankGroups * Tile::kWarpColumns;
  }
};

template <class X, int kRanks>
__global__ void __launch_bounds__(kThreads, GradientTile<X, kRanks>::kBlocks)
    weight_gradient_kernel(GradientSides<X> sides, int splits) {
  using Tile = GradientTile<X, kRanks>;
  const int first_tiles = sides.side[0].tiles(), of_second = int(blockIdx.x) >= first_tiles;
  const GradientSide<X>& side = sides.side[of_second];
  const int tile = int(blockIdx.x) - (of_second ? first_tiles : 0), split = blockIdx.y;
  const int64_t chunks = (side.latents.T + Tile::kDepth - 1) / Tile::kDepth;
  const int first = int(chunks * split / splits), last = int(chunks * (split + 1) / splits);
  GradientBlock<Tile, X> block{*dynamic_shared<typename Tile::Shared>(),
                               side,
                               tile / side.rank_tiles / side.column_tiles,
                               tile % side.rank_tiles * kRanks,
                               tile / side.rank_tiles % side.column_tiles * Tile::kColumns,
                               last,
                               {}};

  float total[Tile::kWarpColumns / 8][4] = {};
  multiply_chunks<Tile::kStages>(block, first, side.mask.seed != nullptr, total);
  block.store(split, total);
}

}  // namespace gralora::cuda
