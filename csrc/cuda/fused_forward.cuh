// SPDX-License-Identifier: Apache-2.0
// fused_forward: x, base and the adapter to y in one launch. The ranks stay in shared memory; U is
// written once for backward.
//
// A block owns 128 tokens. It takes them through project's loop for each n and keeps the sums where
// they belong after the block exchange, H[t, n, j*rb + q] at [t][j][n*rb + q]; then through
// expand's loop for each j. The two loops share the memory of their buffers. All is added up in the
// order of the two launches with one split: the same bits.
#pragma once

#include "expand.cuh"
#include "project.cuh"

namespace gralora::cuda {

template <class X, class P, int columns>
struct FusedTile {
  // Rows of 64 bytes: two blocks fit into a multiprocessor of 8.0, one into those with the least.
  using Project = ProjectTile<X, P, columns, 64>;
  using Expand = ExpandTile<Ranks, X, P, columns, sizeof(X) == 2 ? 2 : 1>;
  static constexpr int kRankPitch = kFusedRanks + kRankPadding;
  struct Shared {
    float ranks[kTokens][kRankPitch];  // [t][j][n*rb + q], then the general part in each j, then zeros
    union {
      typename Project::Shared project;
      typename Expand::Shared expand;
    };
  };
  static_assert(columns <= kFusedBlockRanks && sizeof(Shared) <= 99 * 1024);
};

template <class X, class P, int columns>
__global__ void __launch_bounds__(kThreads, 2)
    fused_forward_kernel(ProjectSide<X, P> from, ExpandSide<X, P> to, float scale) {
  using Tile = FusedTile<X, P, columns>;
  typename Tile::Shared& shared = *dynamic_shared<typename Tile::Shared>();
  const Ranks& ranks = from.ranks;
  const int k = ranks.k, r = ranks.r, rb = r / k, all_ranks = r + ranks.h, of_block = used_ranks(all_ranks, 0, columns);
  const RowRange rows = ranks.rows(blockIdx.x);
  const int64_t t0 = rows.first, chunks = (from.w + Tile::Project::kDepth - 1) / Tile::Project::kDepth;

  for (int n = 0; n < k; n++) {
    if (n > 0) sync_block();  // all are done with the buffers
    project_tile<typename Tile::Project>(shared.project, from, n, t0, 0, chunks, 0, [&](int m, int c, float sum) {
      float* of_token = shared.ranks[m];
      if (c < r) {
        of_token[c / rb * of_block + n * rb + c % rb] = sum;
      } else if (c < all_ranks) {
        of_token[c] = n == 0 ? sum : of_token[c] + sum;
      }
    });
  }
  sync_block();  // the sums are there, and all are done with the buffers

  for (int i = threadIdx.x; i < kTokens * of_block; i += kThreads) {
    const int m = i / of_block, c = i % of_block;
    const float general = c >= r && c < all_ranks ? shared.ranks[m][c] : 0.0f;
    for (int j = 0; j < k; j++) {
      float& at = shared.ranks[m][j * of_block + c];
      const float value = c < r ? at : general;
      if (t0 + m < rows.last && c < all_ranks) ranks.keep(t0 + m, j, c, value);
      at = scale * value;
    }
  }

  // A barrier between its factor and its first product makes the ranks known to all.
  for (int j = 0; j < k; j++)
    expand_tiles<typename Tile::Expand>(shared.expand, to, rows, j, 0, to.w, &shared.ranks[0][j * of_block],
                                        Tile::kRankPitch, 1, 0, [](int, int) {});
}

}  // namespace gralora::cuda
