// SPDX-License-Identifier: Apache-2.0
// Latents: what a token is in the adapter's low-rank space, H or U in forward, dU or dH in
// backward; one number a rank. In a merge the rows of B take their place.
#pragma once

#include "factor.cuh"

namespace gralora::cuda {

// The latents of T tokens, in one of two forms:
//   kept      [T, k*r + h]: U (or dH), then the general part, as forward leaves them for backward
//   partial   [splits][T][k][r + h]: sums over parts of a width by block, before the block
//             exchange; whoever reads them adds the splits (and, for the general part, the blocks)
//             in order
struct Latents {
  static constexpr bool kAllPieces = false;
  float* data;
  int64_t T;
  int k, r, h, splits;  // splits == 0: kept
  float* to_keep;       // where the first reader leaves them as kept, for backward; nullptr: nowhere

  __device__ float* partial(int split, int64_t t, int block) const {
    return data + ((split * T + t) * k + block) * int64_t(r + h);
  }
  __device__ int64_t kept(int64_t t, int j, int rank) const {
    return t * (int64_t(k) * r + h) + (rank < r ? j : k - 1) * r + rank;
  }
  __device__ RowRange rows(int tile) const {
    const int64_t first = int64_t(tile) * kTokens;
    return {first, first + kTokens < T ? first + kTokens : T};
  }
  __device__ int first_rank(int64_t) const { return 0; }
  // What output block j meets at that rank. rank < r: after the exchange,
  // U[t, j, rank] = H[t, rank / rb, j*rb + rank % rb]; then the general part.
  __device__ float get(int64_t t, int j, int rank) const {
    if (splits == 0) return load_global(data + kept(t, j, rank));
    float sum = 0.0f;
    const int rb = r / k;
    if (rank < r) {
      for (int s = 0; s < splits; s++) sum += load_global(partial(s, t, rank / rb) + j * rb + rank % rb);
    } else {
      for (int s = 0; s < splits; s++)
        for (int n = 0; n < k; n++) sum += load_global(partial(s, t, n) + rank);
    }
    return sum;
  }
  __device__ void keep(int64_t t, int j, int rank, float value) const {
    if (to_keep == nullptr || (rank >= r && j > 0)) return;
    store_global(to_keep + kept(t, j, rank), value);
  }
};

// Of a merge, whose rows are W's: a row of output block j meets, in column block n, the ranks
// n*rb .. of B_j and j*rb .. of A_n.
template <class P>
struct RowsOfB {
  static constexpr bool kAllPieces = true;
  Factor<P> B, general;  // of [k, M/k, r] and [1, M, h]
  int64_t block_rows;    // M/k
  int tiles_per_block, rb, h;

  __device__ RowRange rows(int tile) const {
    const int64_t start = tile / tiles_per_block * block_rows, first = int64_t(tile % tiles_per_block) * kTokens;
    return {start + first, start + (first + kTokens < block_rows ? first + kTokens : block_rows)};
  }
  __device__ int first_rank(int64_t row) const { return int(row / block_rows) * rb; }
  __device__ float get(int64_t row, int n, int rank) const {
    if (rank >= rb) return general.get(0, row, rank - rb);
    return B.get(row / block_rows, row % block_rows, n * rb + rank);
  }
  __device__ void keep(int64_t, int, int, float) const {}
};

}  // namespace gralora::cuda
