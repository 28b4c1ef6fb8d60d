// SPDX-License-Identifier: Apache-2.0
// expand: from latents to a wide activation, added to base where there is one.
//
//   y[t, j*w + o] = base[t, j*w + o] + m * s * sum_c U[t, j, c] * Q[j][o, c]      c < r
//                                    + m * s * sum_c U[t, c] * G[j][o, c]         c < h
//
// Forward: U = exchange(H), B^T, Bg give y. Backward: dH = exchange(dU), A, Ag^T give dx, m is the
// mask of dropout (1 elsewhere). Merge: y is W, its rows are the tokens, U is B^T and Bg, Q is A
// and Ag^T. w = width/k; `Left` says which latents a row has (Latents does the exchange).
//
// A block owns 128 tokens and `tiles` tiles of 64 columns of one j; a warp owns 16 tokens. base is
// read once and y written once, in 16-byte pieces through shared memory. Q is converted to
// bfloat16 pieces once a block and tile. The latents are read once a block, into shared memory, 64
// ranks at a time (again for each tile where there are more). Each y is one sum in a fixed order,
// rounded once.
#pragma once

#include "fragments.cuh"
#include "latents.cuh"

namespace gralora::cuda {

constexpr int kColumns = 64;  // of y in a tile

// kRanks: of a chunk
template <class Left, class Y, class P, int kRanks_>
struct ExpandTile {
  static constexpr int kRanks = kRanks_;
  // Tiles of y, the next one on its way from base: two where two blocks of a multiprocessor still
  // have room for them
  static constexpr int kTiles = sizeof(Y) == 2 && kRanks == 32 ? 2 : 1, kAhead = kTiles - 1;
  // A 16-bit y needs no third piece of its summands, 2^-16 of them. A merged weight, which is
  // rounded for good, keeps all pieces of its factor: of float16, 0.13 % and not 0.31 % round the
  // other way.
  static constexpr int kLatentPieces = sizeof(Y) == 4 ? 3 : 2;
  static constexpr int kFactorPieces = Left::kAllPieces || kPieces<P> < kLatentPieces ? kPieces<P> : kLatentPieces;
  static constexpr int kLevel = kFactorPieces > kLatentPieces ? kFactorPieces : kLatentPieces;
  // What tensor cores cut is not seen where y is rounded to 16 bits, nor in the sums of 32 ranks.
  static constexpr bool kPromotes = sizeof(Y) == sizeof(float) && kRanks > 32;
  static constexpr int kFactorPitch = kColumns + 8;
  static constexpr int kPitch = kColumns + 16 / sizeof(Y);
  // A token's latents of a chunk, scaled, and a bit for each column of a tile: whether it is kept.
  // Latents are read by 8-byte loads: without bank conflicts where a row is 32 bytes longer than a
  // multiple of 128.
  struct Row {
    float latents[kRanks];
    uint16_t kept[16];
  };
  static constexpr int kLatentPitch = sizeof(Row) / sizeof(float);
  struct Shared {
    Row rows[kTokens];
    bf16 factor[kFactorPieces][kRanks][kFactorPitch];
    Y y[kTiles][kTokens][kPitch];
  };
  static_assert(sizeof(Shared) <= 99 * 1024);
};

// The way from latents to y
template <class Y, class P>
struct ExpandSide {
  FactorPair<P> factor;
  ActivationView<const Y> base;
  ActivationView<Y> y;
  float scale;
  Mask mask;
};

// A block of the grid at work: columns before `end` of block j of y, for `rows`.
template <class Tile, class Left, class Y, class P>
struct ExpandBlock {
  using Sums = float[kColumns / 8][4];  // of a thread, in the layout of mma's results
  typename Tile::Shared& shared;
  const Left& left;
  const ExpandSide<Y, P>& side;
  RowRange rows;
  int j, end;

  __device__ __forceinline__ int ranks() const { return side.factor.r + side.factor.h; }
  __device__ __forceinline__ bool has_base() const { return side.base.data != nullptr; }

  // `keeps`: the first time that these latents are read
  __device__ __forceinline__ void load_latents(int chunk, bool keeps) {
    const int rank0 = chunk * Tile::kRanks, used = used_ranks(rank0);
#pragma unroll 1  // several at once would take registers from the sums
    for (int i = threadIdx.x; i < kTokens * Tile::kRanks; i += kThreads) {
      const int m = i / Tile::kRanks, c = i % Tile::kRanks;
      if (c >= used) continue;
      const bool inside = rows.first + m < rows.last && rank0 + c < ranks();
      const float value = inside ? left.get(rows.first + m, j, rank0 + c) : 0.0f;
      shared.rows[m].latents[c] = side.scale * value;
      if (keeps && inside) left.keep(rows.first + m, j, rank0 + c, value);
    }
  }

  __device__ __forceinline__ void load_factor(int chunk, int column0) {
    const int rank0 = chunk * Tile::kRanks, used = used_ranks(rank0), first_rank = left.first_rank(rows.first);
    const bool along_ranks = side.factor.along_ranks();
    const int fours = (along_ranks ? Tile::kRanks : used) * (kColumns / 4);
    for (int i = threadIdx.x; i < fours; i += kThreads) {
      const FourAt at = side.factor.template four_of_tile<kColumns, Tile::kRanks>(i);
      if (at.rank >= used) continue;
      float value[4];
      side.factor.get_four(j, first_rank, {column0 + at.column, rank0 + at.rank}, value);
      store_four<Tile::kFactorPieces>(&shared.factor[0][at.rank][at.column], Tile::kRanks * Tile::kFactorPitch,
                                      along_ranks ? Tile::kFactorPitch : 1, value);
    }
  }

  __device__ __forceinline__ void load_base(int tile, int column0) {
    if (has_base() && column0 < end)
      load_tile<kTokens, kColumns>(&shared.y[tile][0][0], Tile::kPitch, side.base, rows, columns(column0));
    cp_async_commit();
  }

  __device__ __forceinline__ void draw_mask(int column0) {
    const uint64_t key = side.mask.key();
    for (int i = threadIdx.x; i < kTokens * (kColumns / 16); i += kThreads) {
      const int m = i / (kColumns / 16), group = i % (kColumns / 16);
      shared.rows[m].kept[group] =
          uint16_t(side.mask.kept(key, rows.first + m, columns(column0).in_row() + group * 16));
    }
  }

  // Of a warp: its 16 tokens by a tile's columns, over the ranks of a chunk
  __device__ __forceinline__ void multiply_chunk(int chunk, Sums& total) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll Tile::kPromotes ? 1 : Tile::kRanks / 16  // sums beside totals leave no registers for more
    for (int k0 = 0; k0 < Tile::kRanks; k0 += 16) {
      if (chunk * Tile::kRanks + k0 >= ranks()) break;
      uint32_t a[Tile::kLatentPieces][4];
      load_rows(a, &shared.rows[warp * 16].latents[k0], Tile::kLatentPitch, lane);
#pragma unroll
      for (int c = 0; c < kColumns; c += 16) {
        uint32_t near[Tile::kFactorPieces][2], far[Tile::kFactorPieces][2];
        load_pieces(near, far, &shared.factor[0][k0][c], Tile::kRanks * Tile::kFactorPitch, Tile::kFactorPitch, lane);
        if constexpr (Tile::kPromotes) {
          float sum[2][4] = {};
          multiply<Tile::kLevel>(sum[0], a, near);
          multiply<Tile::kLevel>(sum[1], a, far);
          promote(total[c / 8], sum[0]), promote(total[c / 8 + 1], sum[1]);
        } else {
          multiply<Tile::kLevel>(total[c / 8], a, near);
          multiply<Tile::kLevel>(total[c / 8 + 1], a, far);
        }
      }
    }
  }

  __device__ __forceinline__ void add_to_base(int tile, const Sums& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int c = 0; c < kColumns / 8; c++)
#pragma unroll
      for (int v = 0; v < 4; v++) {
        const int m = warp * 16 + lane / 4 + v / 2 * 8, column = c * 8 + lane % 4 * 2 + v % 2;
        const bool kept = side.mask.seed == nullptr || (shared.rows[m].kept[column / 16] >> column % 16 & 1);
        const float sum = kept ? total[c][v] : 0.0f;
        Y& at = shared.y[tile][m][column];
        at = from_float<Y>(has_base() ? to_float(at) + sum : sum);
      }
  }

  __device__ __forceinline__ void store_y(int tile, int column0) const {
    store_tile<kTokens, kColumns>(&shared.y[tile][0][0], Tile::kPitch, side.y, rows, columns(column0));
  }

 private:
  // Ranks of a chunk, in whole steps of an mma
  __device__ __forceinline__ int used_ranks(int rank0) const {
    return ranks() - rank0 < Tile::kRanks ? (ranks() - rank0 + 15) / 16 * 16 : Tile::kRanks;
  }
  __device__ __forceinline__ TileColumns columns(int column0) const {
    return {int64_t(j) * side.factor.w, column0, side.factor.w};
  }
};

// Blocks of a multiprocessor that must have registers, where sums stand beside totals: for devices
// from 10.0 on nvcc wants a few more than 128 of a thread, and would spill them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksWithTotals = 1;
#else
constexpr int kBlocksWithTotals = 2;
#endif

template <class Left, class Y, class P, int kRanks>
__global__ void __launch_bounds__(kThreads, ExpandTile<Left, Y, P, kRanks>::kPromotes ? kBlocksWithTotals : 2)
    expand_kernel(Left left, ExpandSide<Y, P> side, int tiles) {
  using Tile = ExpandTile<Left, Y, P, kRanks>;
  const int begin = blockIdx.y * tiles * kColumns, last = begin + tiles * kColumns, w = side.factor.w;
  ExpandBlock<Tile, Left, Y, P> block{*dynamic_shared<typename Tile::Shared>(),
                                      left,
                                      side,
                                      left.rows(blockIdx.x),
                                      int(blockIdx.z),
                                      last < w ? last : w};
  const int chunks = (block.ranks() + kRanks - 1) / kRanks;

  if (chunks == 1) block.load_latents(0, begin == 0);
  if (Tile::kAhead > 0) block.load_base(0, begin);
  int tile = 0;
  for (int column0 = begin; column0 < block.end; column0 += kColumns, tile = Tile::kAhead - tile) {
    block.load_base(Tile::kAhead - tile, column0 + Tile::kAhead * kColumns);
    typename decltype(block)::Sums total = {};
    for (int chunk = 0; chunk < chunks; chunk++) {
      if (chunks > 1) block.load_latents(chunk, column0 == 0);
      block.load_factor(chunk, column0);
      sync_block();
      block.multiply_chunk(chunk, total);
      if (chunk + 1 < chunks) sync_block();  // all are done with these latents
    }
    if (side.mask.seed != nullptr) block.draw_mask(column0);
    cp_async_wait<Tile::kAhead>();
    sync_block();  // base and the mask are there for all
    block.add_to_base(tile, total);
    sync_block();
    block.store_y(tile, column0);  // each thread what it will fill with a later tile of base: no barrier
  }
}

}  // namespace gralora::cuda
