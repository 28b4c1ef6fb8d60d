// SPDX-License-Identifier: Apache-2.0
// expand: from the ranks to a wide activation, added to base where there is one.
//
//   y[t, j*w + o] = base[t, j*w + o] + sum_c s*U[t, j, c] * Q[j][c, o] + sum_c s*U[t, c] * G[j][c, o]
//
// Forward: U = exchange(H), B, Bg^T give y. Backward: dH = exchange(dU), A^T, Ag give dx. Merge: y
// is W, its rows are the tokens, U is B^T and Bg, Q is A^T and Ag. w = width/k; `Left` says which
// ranks a row has (Ranks does the exchange).
//
// A block owns 128 tokens and `tiles` tiles of 64 columns of one j; a warp owns 16 tokens. base is
// read once and y written once, in 16-byte pieces through shared memory; Q is converted to bfloat16
// pieces once a block and tile; the ranks are read once a block, into shared memory, 64 at a time
// (again for each tile where there are more). One sum in a fixed order per y, rounded once.
#pragma once

#include "fragments.cuh"

namespace gralora::cuda {

constexpr int kColumns = 64;  // of y in a tile

// Ranks of a chunk, in whole steps of an mma
__device__ __forceinline__ int used_ranks(int all_ranks, int rank0, int chunk) {
  return all_ranks - rank0 < chunk ? (all_ranks - rank0 + 15) / 16 * 16 : chunk;
}

// kRanks: of a chunk; kTiles: of y, the next ones on their way from base
template <class Left, class Y, class P, int kRanks_, int kTiles_>
struct ExpandTile {
  static constexpr int kRanks = kRanks_, kTiles = kTiles_;
  // A 16-bit y needs no third piece of its summands, 2^-16 of them; of a merged weight, which is
  // rounded once for good, more would go the other way than is allowed.
  static constexpr int kRankPieces = sizeof(Y) == 4 ? 3 : 2;
  static constexpr int kFactorPieces = Left::kAllPieces || kPieces<P> < kRankPieces ? kPieces<P> : kRankPieces;
  static constexpr int kFactorPitch = kColumns + 8;
  static constexpr int kPitch = kColumns + 16 / sizeof(Y);
  struct Shared {
    bf16 factor[kFactorPieces][kRanks][kFactorPitch];
    Y y[kTiles][kTokens][kPitch];
  };
};

// The way from ranks to y, of r of each block and h general ones
template <class Y, class P>
struct ExpandSide {
  Factor<P> factor, general;
  ActivationView<const Y> base;
  ActivationView<Y> y;
  int w, r, h;
  Mask mask;
};

// Ranks as an operand that is read by 8-byte loads: without bank conflicts where a row is 32 bytes
// longer than a multiple of 128
constexpr int kRankPadding = 8;

// Columns [begin, end) of block j of `rows`, by all threads. `ranks`: in shared memory, scaled,
// [kTokens][rank_pitch], zeros to the next multiple of 16. Where there are several chunks of them,
// load_ranks(chunk, column) brings each for its turn. factor_rank0: the first rank of Q that is
// met.
template <class Tile, class Y, class P, class LoadRanks>
__device__ __forceinline__ void expand_tiles(typename Tile::Shared& shared, const ExpandSide<Y, P>& side, RowRange rows,
                                             int j, int begin, int end, const float* ranks, int rank_pitch,
                                             int rank_chunks, int factor_rank0, LoadRanks&& load_ranks) {
  constexpr int kRanks = Tile::kRanks, kVector = 16 / sizeof(Y);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const Factor<P>&factor = side.factor, &general = side.general;
  const ActivationView<const Y>& base = side.base;
  const ActivationView<Y>& y = side.y;
  const Mask& mask = side.mask;
  const int64_t t0 = rows.first, block_column = int64_t(j) * side.w;
  const int w = side.w, r = side.r, all_ranks = side.r + side.h;

  // In groups of 4 along the unit stride of Q
  const auto load_factor = [&](int rank0, int column0) {
    const bool along_columns = factor.column_stride == 1;
    const bool vectors = factor.vectors && (along_columns || factor_rank0 % 4 == 0);
    const int used = used_ranks(all_ranks, rank0, kRanks), groups = (along_columns ? used : kRanks) * (kColumns / 4);
    for (int i = tid; i < groups; i += kThreads) {
      const int c = along_columns ? i / (kColumns / 4) : i % (kRanks / 4) * 4;
      const int o = along_columns ? i % (kColumns / 4) * 4 : i / (kRanks / 4);
      if (c >= used) continue;
      const int rank = rank0 + c;
      const int column = column0 + o;
      float value[4];
      if (vectors && (along_columns ? rank < r && column + 4 <= w : rank + 4 <= r && column < w)) {
        factor.get_four(j, factor_rank0 + rank, column, value);
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int at = rank + (along_columns ? 0 : e);
          const int of = column + (along_columns ? e : 0);
          value[e] = at >= all_ranks || of >= w ? 0.0f
                     : at < r                   ? factor.get(j, factor_rank0 + at, of)
                                                : general.get(j, at - r, of);
        }
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        bf16 piece[Tile::kFactorPieces];
        split_float(value[e], piece);
#pragma unroll
        for (int p = 0; p < Tile::kFactorPieces; p++)
          shared.factor[p][c + (along_columns ? 0 : e)][o + (along_columns ? e : 0)] = piece[p];
      }
    }
  };
  const bool has_base = base.data != nullptr;
  const auto load_base = [&](int tile, int column0) {
    if (has_base && column0 < end)
      for (int i = tid; i < kTokens * (kColumns / kVector); i += kThreads) {
        const int m = i / (kColumns / kVector), c = i % (kColumns / kVector) * kVector;
        const int left = w - column0 - c;
        const bool inside = t0 + m < rows.last && left > 0;
        const Y* from = base.data + (t0 + m) * base.stride + block_column + column0 + c;
        if (base.vectors)
          cp_async_16(&shared.y[tile][m][c], inside ? from : base.data, inside ? 16 : 0);
        else
          for (int e = 0; e < kVector; e++)
            shared.y[tile][m][c + e] = inside && e < left ? load_global(from + e) : from_float<Y>(0.0f);
      }
    cp_async_commit();
  };
  const auto store_y = [&](int tile, int column0) {
    for (int i = tid; i < kTokens * (kColumns / kVector); i += kThreads) {
      const int m = i / (kColumns / kVector), c = i % (kColumns / kVector) * kVector;
      const int left = w - column0 - c;
      if (t0 + m >= rows.last || left <= 0) continue;
      Y* to = y.data + (t0 + m) * y.stride + block_column + column0 + c;
      if (y.vectors && left >= kVector)
        store_global(reinterpret_cast<uint4*>(to), shared_vector(&shared.y[tile][m][c]));
      else
        for (int e = 0; e < kVector && e < left; e++) store_global(to + e, shared.y[tile][m][c + e]);
    }
  };

  constexpr int kAhead = Tile::kTiles - 1;
  if (kAhead > 0) load_base(0, begin);
  int tile = 0;
  for (int column0 = begin; column0 < end; column0 += kColumns, tile = kAhead - tile) {
    load_base(kAhead - tile, column0 + kAhead * kColumns);
    float acc[kColumns / 8][4] = {};
    for (int chunk = 0; chunk < rank_chunks; chunk++) {
      if (rank_chunks > 1) load_ranks(chunk, column0);
      load_factor(chunk * kRanks, column0);
      sync_block();
#pragma unroll
      for (int k0 = 0; k0 < kRanks; k0 += 16) {
        if (chunk * kRanks + k0 >= all_ranks) break;
        uint32_t a[Tile::kRankPieces][4];
        load_rows(a, ranks + warp * 16 * rank_pitch + k0, rank_pitch, lane);
#pragma unroll
        for (int c = 0; c < kColumns; c += 16) {
          uint32_t left[Tile::kFactorPieces][2], right[Tile::kFactorPieces][2];
          load_pieces(left, right, &shared.factor[0][k0][c], kRanks * Tile::kFactorPitch, Tile::kFactorPitch, lane);
          multiply(acc[c / 8], a, left);
          multiply(acc[c / 8 + 1], a, right);
        }
      }
      if (chunk + 1 < rank_chunks) sync_block();  // all are done with these ranks
    }
    cp_async_wait<kAhead>();
    sync_block();  // base has landed for all
#pragma unroll
    for (int c = 0; c < kColumns / 8; c++)
#pragma unroll
      for (int v = 0; v < 4; v++) {
        Y& at = shared.y[tile][warp * 16 + lane / 4 + v / 2 * 8][c * 8 + lane % 4 * 2 + v % 2];
        at = from_float<Y>(has_base ? to_float(at) + acc[c][v] : acc[c][v]);
      }
    sync_block();
    if (mask.seed != nullptr) {  // y is dx, without a base
      drop_tile(mask, &shared.y[tile][0][0], Tile::kPitch, kTokens, kColumns, t0, block_column + column0, tid,
                kThreads);
      sync_block();
    }
    store_y(tile, column0);  // each thread what it will fill with a later tile of base: no barrier
  }
}

template <class Left, class Y, class P, int kRanks>
struct ExpandKernelTile {
  // Two tiles of y where two blocks a multiprocessor still have room
  using Tile = ExpandTile<Left, Y, P, kRanks, sizeof(Y) == 2 && kRanks == 32 ? 2 : 1>;
  static constexpr int kRankPitch = kRanks + kRankPadding;
  struct Shared {
    float ranks[kTokens][kRankPitch];
    typename Tile::Shared tile;
  };
  static_assert(sizeof(Shared) <= 99 * 1024);
};

template <class Left, class Y, class P, int kRanks>
__global__ void __launch_bounds__(kThreads, 2)
    expand_kernel(Left left_ranks, ExpandSide<Y, P> side, int tiles, float scale) {
  using KernelTile = ExpandKernelTile<Left, Y, P, kRanks>;
  typename KernelTile::Shared& shared = *dynamic_shared<typename KernelTile::Shared>();
  const RowRange rows = left_ranks.rows(blockIdx.x);
  const int64_t t0 = rows.first;
  const int j = blockIdx.z, all_ranks = side.r + side.h, rank_chunks = (all_ranks + kRanks - 1) / kRanks;
  const int begin = blockIdx.y * tiles * kColumns, last = begin + tiles * kColumns, end = last < side.w ? last : side.w;

  const auto load_ranks = [&](int chunk, int column0) {
    const int rank0 = chunk * kRanks, used = used_ranks(all_ranks, rank0, kRanks);
#pragma unroll 1  // several at once would take registers from the sums
    for (int i = threadIdx.x; i < kTokens * kRanks; i += kThreads) {
      const int m = i / kRanks, c = i % kRanks;
      if (c >= used) continue;
      const bool inside = t0 + m < rows.last && rank0 + c < all_ranks;
      const float value = inside ? left_ranks.get(t0 + m, j, rank0 + c) : 0.0f;
      shared.ranks[m][c] = scale * value;
      if (column0 == 0 && inside) left_ranks.keep(t0 + m, j, rank0 + c, value);
    }
  };
  if (rank_chunks == 1) load_ranks(0, begin);
  expand_tiles<typename KernelTile::Tile>(shared.tile, side, rows, j, begin, end, &shared.ranks[0][0],
                                          KernelTile::kRankPitch, rank_chunks, left_ranks.first_rank(t0), load_ranks);
}

}  // namespace gralora::cuda
