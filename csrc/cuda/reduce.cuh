// SPDX-License-Identifier: Apache-2.0
// reduce: the second pass of the weight gradients. gradient[n][i, c] = sum over splits of
// sums[split][n][c][i], in their order.
#pragma once

#include "geometry.cuh"

namespace gralora::cuda {

constexpr int kReduceThreads = 256;

// Where a gradient lies: [blocks, w, ranks] by its strides; data == nullptr: not wanted.
template <class P>
struct Gradient {
  P* data;
  int64_t block_stride, column_stride, rank_stride;

  __device__ void set(int64_t block, int64_t column, int64_t rank, float value) const {
    if (data != nullptr)
      store_global(data + block * block_stride + column * column_stride + rank * rank_stride, from_float<P>(value));
  }
};

template <class P>
struct ReduceSide {
  const float* sums;  // [splits][k][r + h][w]; nullptr: not wanted
  int64_t w;
  int k, r, h;
  Gradient<P> block, general;

  __host__ __device__ int64_t elements() const { return sums == nullptr ? 0 : int64_t(k) * (r + h) * w; }
};

template <class P>
struct ReduceSides {
  ReduceSide<P> side[2];
};

template <class P>
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(ReduceSides<P> sides, int splits) {
  const int64_t index = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x, first = sides.side[0].elements();
  const ReduceSide<P>& side = sides.side[index >= first];
  const int64_t element = index >= first ? index - first : index;
  if (element >= side.elements()) return;
  float sum = 0.0f;
  for (int split = 0; split < splits; split++) sum += load_global(side.sums + split * side.elements() + element);
  const int64_t ranks = side.r + side.h;
  const int64_t column = element % side.w, rank = element / side.w % ranks, n = element / side.w / ranks;
  if (rank < side.r)
    side.block.set(n, column, rank, sum);
  else
    side.general.set(n, column, rank - side.r, sum);
}

}  // namespace gralora::cuda
