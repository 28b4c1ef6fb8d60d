// SPDX-License-Identifier: Apache-2.0
// project: from a wide activation to the ranks, before the block exchange (see Ranks).
//
//   ranks[split][t][n][c]     = f * sum_{i in split} x'[t, n*w + i] * P[n][i, c]      c < r
//   ranks[split][t][n][r + c] = f * sum_{i in split} x'[t, n*w + i] * G[n][i, c]      c < h
//
// Forward: x, A, Ag^T. Backward: g, B^T, Bg. w = width/k; f carries the scaling and the 1/(1-p) of
// dropout.
//
// A block owns 128 tokens, one n, `columns` ranks and one split of the w columns; a warp owns 16
// tokens. x goes through a ring of kStages tiles of kRowBytes a row (cp.async), each read once per
// group of ranks; P through two buffers of bfloat16 pieces, converted once a block. Both are read
// by ldmatrix from rows that are 16 bytes longer than a multiple of 64, or a float x by 8-byte
// loads from rows that are 32 longer: no bank conflicts. Sums are taken in the order of i, in
// registers: the result depends on nothing but the shape and the number of splits.
#pragma once

#include "fragments.cuh"

namespace gralora::cuda {

template <class X, class P, int columns, int kRowBytes>
struct ProjectTile {
  static constexpr int kColumns = columns;
  static constexpr int kDepth = kRowBytes / sizeof(X);  // columns of x in a stage
  static constexpr int kPitch =
      kDepth + (sizeof(X) == 4 ? 32 : 16) / sizeof(X);  // elements from a row of x to the next
  static constexpr int kFactorPitch = columns + 8;
  static constexpr int kFactorPieces = kPieces<P>;
  // Three, where two blocks still fit into the 163 KiB of a multiprocessor of 8.0
  static constexpr int kStages = kFactorPieces * kDepth * columns > 4096 ? 2 : 3;
  static constexpr int kGroups = kDepth * columns / 4 / kThreads;  // of 4 elements of P that a thread converts
  struct Shared {
    X x[kStages][kTokens][kPitch];
    bf16 factor[2][kFactorPieces][kDepth][kFactorPitch];
  };
  static_assert(sizeof(Shared) <= 99 * 1024);
  static_assert(kDepth * columns % (4 * kThreads) == 0 || kDepth * columns < 4 * kThreads);
};

// One of the products of a launch, all of which have the same numbers of blocks, ranks, tokens and
// splits: in backward g and, where forward did not keep U, x.
template <class X, class P>
struct ProjectSide {
  ActivationView<const X> x;
  Factor<P> factor, general;
  Ranks ranks;
  int64_t w;  // of a block
  float scale;
  Mask mask;
};
template <class X, class P>
struct ProjectSides {
  ProjectSide<X, P> side[2];
};

// The sums of 128 tokens from t0 with one n over the chunks [first, last), `Tile::kColumns` ranks
// from rank0: store(m, c, sum) of token t0 + m and rank rank0 + c, each by one thread, which is the
// same for each n. Leaves shared memory while others may still read it.
template <class Tile, class X, class P, class Store>
__device__ __forceinline__ void project_tile(typename Tile::Shared& shared, const ProjectSide<X, P>& side, int n,
                                             int64_t t0, int64_t first, int64_t last, int rank0, Store&& store) {
  constexpr int columns = Tile::kColumns, kDepth = Tile::kDepth;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const ActivationView<const X>& x = side.x;
  const Factor<P>&factor = side.factor, &general = side.general;
  const Ranks& ranks = side.ranks;
  const Mask& mask = side.mask;
  const int64_t w = side.w;

  const auto load_x = [&](int stage, int64_t chunk) {
    if (chunk < last) {
      constexpr int kVector = 16 / sizeof(X), kVectors = kDepth / kVector;
      for (int i = tid; i < kTokens * kVectors; i += kThreads) {
        const int m = i / kVectors, c = i % kVectors * kVector;
        const int64_t column = chunk * kDepth + c, left = w - column;
        X* to = &shared.x[stage][m][c];
        const X* from = x.data + (t0 + m) * x.stride + n * w + column;
        const bool inside = t0 + m < ranks.T && left > 0;
        if (x.vectors) {
          cp_async_16(to, inside ? from : x.data, inside ? 16 : 0);
        } else {
          for (int e = 0; e < kVector; e++) to[e] = inside && e < left ? load_global(from + e) : from_float<X>(0.0f);
        }
      }
    }
    cp_async_commit();
  };

  // Element (i, c) of a chunk of P beside G
  const auto factor_at = [&](int64_t i, int c) -> float {
    if (i >= w || c >= ranks.r + ranks.h) return 0.0f;
    return c < ranks.r ? factor.get(n, i, c) : general.get(n, i, c - ranks.r);
  };
  constexpr int kHeld = Tile::kGroups > 0 ? Tile::kGroups : 1;
  float held[kHeld][4] = {};
  const bool along_ranks = factor.column_stride == 1;
  const auto place = [&](int group, int& i, int& c) {  // where a group of 4 lies: along P's unit stride
    if (along_ranks)
      i = group / (columns / 4), c = group % (columns / 4) * 4;
    else
      i = group % (kDepth / 4) * 4, c = group / (kDepth / 4);
  };
  const auto load_factor = [&](int64_t chunk) {
#pragma unroll
    for (int q = 0; q < kHeld; q++) {
      const int group = tid + q * kThreads;
      int i, c;
      place(group, i, c);
      const int64_t row = chunk * kDepth + i;
      const int rank = rank0 + c;
      if (group * 4 >= kDepth * columns || chunk >= last) continue;
      if (factor.vectors && (along_ranks ? rank + 4 <= ranks.r && row < w : rank < ranks.r && row + 4 <= w)) {
        factor.get_four(n, row, rank, held[q]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++) held[q][e] = factor_at(row + (along_ranks ? 0 : e), rank + (along_ranks ? e : 0));
      }
    }
  };
  const auto store_factor = [&](int buffer) {
#pragma unroll
    for (int q = 0; q < kHeld; q++) {
      const int group = tid + q * kThreads;
      if (group * 4 >= kDepth * columns) break;
      int i, c;
      place(group, i, c);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        bf16 piece[Tile::kFactorPieces];
        split_float(held[q][e], piece);
#pragma unroll
        for (int p = 0; p < Tile::kFactorPieces; p++)
          shared.factor[buffer][p][i + (along_ranks ? 0 : e)][c + (along_ranks ? e : 0)] = piece[p];
      }
    }
  };

  float acc[columns / 8][4] = {};
  for (int stage = 0; stage < Tile::kStages - 1; stage++) load_x(stage, first + stage);
  load_factor(first);
  store_factor(0);
  for (int64_t chunk = first; chunk < last; chunk++) {
    const int step = int(chunk - first), stage = step % Tile::kStages, buffer = step % 2;
    cp_async_wait<Tile::kStages - 2>();
    sync_block();  // this stage has landed for all, and all are done with the one that is filled next
    load_x((step + Tile::kStages - 1) % Tile::kStages, chunk + Tile::kStages - 1);
    load_factor(chunk + 1);
    if (mask.seed != nullptr) {
      drop_tile(mask, &shared.x[stage][0][0], Tile::kPitch, kTokens, kDepth, t0, n * w + chunk * kDepth, tid, kThreads);
      sync_block();
    }
#pragma unroll
    for (int k0 = 0; k0 < kDepth; k0 += 16) {
      uint32_t a[kPieces<X>][4];
      load_rows(a, &shared.x[stage][warp * 16][k0], Tile::kPitch, lane);
#pragma unroll
      for (int c = 0; c < columns; c += 16) {
        uint32_t left[Tile::kFactorPieces][2], right[Tile::kFactorPieces][2];
        load_pieces(left, right, &shared.factor[buffer][0][k0][c], kDepth * Tile::kFactorPitch, Tile::kFactorPitch,
                    lane);
        multiply(acc[c / 8], a, left);
        multiply(acc[c / 8 + 1], a, right);
      }
    }
    store_factor(1 - buffer);
  }

#pragma unroll
  for (int c = 0; c < columns / 8; c++)
#pragma unroll
    for (int v = 0; v < 4; v++)
      store(warp * 16 + lane / 4 + v / 2 * 8, c * 8 + lane % 4 * 2 + v % 2, side.scale * acc[c][v]);
}

template <class X, class P, int columns>
using ProjectKernelTile = ProjectTile<X, P, columns, 128>;

template <class X, class P, int columns>
__global__ void __launch_bounds__(kThreads, 2) project_kernel(ProjectSides<X, P> sides) {
  using Tile = ProjectKernelTile<X, P, columns>;
  typename Tile::Shared& shared = *dynamic_shared<typename Tile::Shared>();
  const int all_ranks = sides.side[0].ranks.r + sides.side[0].ranks.h,
            rank_groups = (all_ranks + columns - 1) / columns;
  // Groups of ranks first: those of one tile of x run together, and all but one find it in L2.
  const int rank0 = blockIdx.x % rank_groups * columns, split = blockIdx.z;
  const ProjectSide<X, P>& side = sides.side[int(blockIdx.y) >= sides.side[0].ranks.k];
  const Ranks& ranks = side.ranks;
  const int n = blockIdx.y % ranks.k, splits = ranks.splits;
  const int64_t t0 = int64_t(blockIdx.x / rank_groups) * kTokens;
  const int64_t chunks = (side.w + Tile::kDepth - 1) / Tile::kDepth;
  const int64_t first = chunks * split / splits, last = chunks * (split + 1) / splits;
  project_tile<Tile>(shared, side, n, t0, first, last, rank0, [&](int m, int c, float sum) {
    if (t0 + m < ranks.T && rank0 + c < all_ranks) store_global(ranks.at(split, t0 + m, n) + rank0 + c, sum);
  });
}

}  // namespace gralora::cuda
