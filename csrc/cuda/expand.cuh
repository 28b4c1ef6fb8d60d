// expand: from the ranks to a wide activation, added to base where there is one.
//
//   y[t, j*w + o] = base[t, j*w + o] + sum_c s*U[t, j, c] * Q[j][c, o] + sum_c s*U[t, c] * G[j][c, o]
//
// Forward: U = exchange(H), B, Bg^T give y. Backward: dH = exchange(dU), A^T, Ag give dx. Merge: y is W, its rows are the tokens,
// U is B^T and Bg, Q is A^T and Ag. w = width/k; `Left` says which ranks a row has (Ranks does the exchange).
//
// A block owns 128 tokens and `tiles` tiles of 64 columns of one j; a warp owns 16 tokens. base is read once and y written once,
// in 16-byte pieces through shared memory; Q is converted to bfloat16 pieces once a block and tile; the ranks are read once
// a block, into shared memory, 64 at a time (again for each tile where there are more). One sum in a fixed order per y,
// rounded once.
#pragma once

#include "fragments.cuh"

namespace gralora::cuda {

constexpr int kColumns = 64;  // of y in a tile

// kRanks: in shared memory together
template <class Left, class Y, class P, int kRanks>
struct ExpandTile {
  // A 16-bit y needs no third piece of its summands, 2^-16 of them; of a merged weight, which is rounded once for good, more
  // would go the other way than is allowed.
  static constexpr int kRankPieces = sizeof(Y) == 4 ? 3 : 2;
  static constexpr int kFactorPieces = Left::kAllPieces || kPieces<P> < kRankPieces ? kPieces<P> : kRankPieces;
  static constexpr int kRankPitch = kRanks + 4;
  static constexpr int kFactorPitch = kColumns + 8;
  static constexpr int kPitch = kColumns + 16 / sizeof(Y);
  // Two tiles of y, the next one on its way from base, where two blocks a multiprocessor still have room
  static constexpr int kTiles = sizeof(Y) == 2 && kRanks == 32 ? 2 : 1;
  struct Shared {
    float ranks[kTokens][kRankPitch];
    bf16 factor[kFactorPieces][kRanks][kFactorPitch];
    Y y[kTiles][kTokens][kPitch];
  };
  static_assert(sizeof(Shared) <= 99 * 1024);
};

template <class Left, class Y, class P, int kRanks>
__global__ void __launch_bounds__(kThreads, 2)
    expand_kernel(Left left_ranks, Factor<P> factor, Factor<P> general, Activation<const Y> base, Activation<Y> y,
                  int w, int h, int tiles, float scale, Mask mask) {
  using Tile = ExpandTile<Left, Y, P, kRanks>;
  constexpr int kVector = 16 / sizeof(Y);
  typename Tile::Shared& shared = *dynamic_shared<typename Tile::Shared>();
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const RowRange rows = left_ranks.rows(blockIdx.x);
  const int64_t t0 = rows.first;
  const int j = blockIdx.z, r = left_ranks.block_ranks(), all_ranks = r + h;
  const int rank_chunks = (all_ranks + kRanks - 1) / kRanks, factor_rank0 = left_ranks.first_rank(t0);
  const int begin = blockIdx.y * tiles * kColumns, last = begin + tiles * kColumns, end = last < w ? last : w;
  const int64_t block_column = int64_t(j) * w;

  // Ranks of a chunk, in whole steps of an mma
  const auto used_ranks = [&](int rank0) {
    return all_ranks - rank0 < kRanks ? (all_ranks - rank0 + 15) / 16 * 16 : kRanks;
  };
  const auto load_ranks = [&](int rank0, bool keep) {
    const int used = used_ranks(rank0);
#pragma unroll 1  // several at once would take registers from the sums
    for (int i = tid; i < kTokens * kRanks; i += kThreads) {
      const int m = i / kRanks, c = i % kRanks;
      if (c >= used) continue;
      const bool inside = t0 + m < rows.last && rank0 + c < all_ranks;
      const float value = inside ? left_ranks.get(t0 + m, j, rank0 + c) : 0.0f;
      shared.ranks[m][c] = scale * value;
      if (keep && inside) left_ranks.keep(t0 + m, j, rank0 + c, value);
    }
  };
  // In groups of 4 along the unit stride of Q
  const auto load_factor = [&](int rank0, int column0) {
    const bool along_columns = factor.column_stride == 1;
    const bool vectors = factor.vectors && (along_columns || factor_rank0 % 4 == 0);
    const int used = used_ranks(rank0), groups = (along_columns ? used : kRanks) * (kColumns / 4);
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
  if (rank_chunks == 1) load_ranks(0, begin == 0);
  int tile = 0;
  for (int column0 = begin; column0 < end; column0 += kColumns, tile = kAhead - tile) {
    load_base(kAhead - tile, column0 + kAhead * kColumns);
    float acc[kColumns / 8][4] = {};
    for (int chunk = 0; chunk < rank_chunks; chunk++) {
      if (rank_chunks > 1) load_ranks(chunk * kRanks, column0 == 0);
      load_factor(chunk * kRanks, column0);
      sync_block();
#pragma unroll
      for (int k0 = 0; k0 < kRanks; k0 += 16) {
        if (chunk * kRanks + k0 >= all_ranks) break;
        uint32_t a[Tile::kRankPieces][4];
        load_rows(a, &shared.ranks[warp * 16][k0], Tile::kRankPitch, lane);
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

}  // namespace gralora::cuda
