// SPDX-License-Identifier: Apache-2.0
// simt: every pass in plain multiply-adds, for what the tensor-core kernels do not take: devices
// before compute capability 8.0, float64, mixed dtypes, weights of any strides. All passes are
// batches of one product, and a launch takes several of them.
//
//   out[b][m, c] (+)= f * ( sum_d L[b][m, d] R[b][d, c]  +  sum_d L'[b][m, d] R'[b][d, c] )
//
// A block of 256 threads owns 64 x 64 of one `out`; a thread 4 x 4. Both operands go through
// shared memory, 16 of the depth at a time, converted to the accumulation type; the depth is
// summed in runs of 128, which are added in their order.
#pragma once

#include "gralora.h"
#include "mask.cuh"

namespace gralora::cuda {

// A tensor [blocks, rows, columns] of any dtype and strides, in elements. Blocks are numbered
// outer * inner_blocks + inner; only merge has inner blocks. Columns lie in groups of `group`: only
// latents that are stored in the order after the exchange have groups.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t outer = 0, inner = 0, row = 0, column = 0;
  int64_t group = INT64_MAX, group_stride = 0;

  __device__ int64_t offset(int64_t b, int64_t inner_blocks, int64_t m, int64_t c) const {
    const int64_t in_group = group == INT64_MAX ? c : c % group, of_group = group == INT64_MAX ? 0 : c / group;
    return b / inner_blocks * outer + b % inner_blocks * inner + m * row + of_group * group_stride + in_group * column;
  }
};

template <class Acc>
__device__ __forceinline__ Acc load_as(const View& view, int64_t index) {
  switch (view.dtype) {
    case DType::bf16: return Acc(to_float(load_global(static_cast<const bf16*>(view.data) + index)));
    case DType::f16: return Acc(to_float(load_global(static_cast<const __half*>(view.data) + index)));
    case DType::f64: return Acc(load_global(static_cast<const double*>(view.data) + index));
    default: return Acc(load_global(static_cast<const float*>(view.data) + index));
  }
}
template <class Acc>
__device__ __forceinline__ void store_as(const View& view, int64_t index, Acc value) {
  switch (view.dtype) {
    case DType::bf16: return store_global(static_cast<bf16*>(view.data) + index, from_float<bf16>(float(value)));
    case DType::f16: return store_global(static_cast<__half*>(view.data) + index, from_float<__half>(float(value)));
    case DType::f64: return store_global(static_cast<double*>(view.data) + index, double(value));
    default: return store_global(static_cast<float*>(view.data) + index, float(value));
  }
}

struct Product {
  int64_t blocks = 1, inner_blocks = 1, rows = 0, columns = 0;
  View left[2], right[2];
  int64_t depth[2] = {0, 0};
  View base, out;  // base.data == nullptr: out is overwritten
  double scale = 1.0;
  // Dropout of the left operand (its rows are tokens), of the right one (its depth is), or of the
  // sums: block b begins at column b * mask_width of x.
  Mask left_mask = {}, right_mask = {}, sum_mask = {};
  int64_t mask_width = 0;
};

constexpr int kSimtTile = 64, kSimtDepth = 16, kSimtRun = 128, kSimtThreads = 256;

inline __host__ __device__ int64_t simt_tiles(int64_t size) { return (size + kSimtTile - 1) / kSimtTile; }

constexpr int kProducts = 4;
struct Products {
  Product product[kProducts];
  int count = 0;

  void add(const Product& p) { product[count++] = p; }
  int64_t tiles() const {
    int64_t sum = 0;
    for (int i = 0; i < count; i++)
      sum += product[i].blocks * simt_tiles(product[i].rows) * simt_tiles(product[i].columns);
    return sum;
  }
};

// A block of the grid at work: the 64 x 64 elements of block b of `out` from (m0, c0) on.
template <class Acc>
struct ProductBlock {
  using Sums = Acc[4][4];  // of a thread: rows from thread_row on, columns from thread_column on
  const Product& p;
  int64_t b, m0, c0;
  Acc (&left)[kSimtTile][kSimtDepth + 1];
  Acc (&right)[kSimtDepth][kSimtTile + 4];

  __device__ static int thread_row() { return int(threadIdx.x) / 16 * 4; }
  __device__ static int thread_column() { return int(threadIdx.x) % 16 * 4; }
  __device__ int64_t mask_column() const { return b * p.mask_width; }

  // Both operands of a term from d0 of the depth on, zeros beyond their ends
  __device__ void load(int term, int64_t d0) {
    const View &L = p.left[term], &R = p.right[term];
    const bool left_along_depth = L.column <= L.row, right_along_columns = R.column <= R.row;
    for (int i = threadIdx.x; i < kSimtTile * kSimtDepth; i += kSimtThreads) {
      const int m = left_along_depth ? i / kSimtDepth : i % kSimtTile;
      const int d = left_along_depth ? i % kSimtDepth : i / kSimtTile;
      const bool inside = m0 + m < p.rows && d0 + d < p.depth[term];
      left[m][d] = inside ? load_as<Acc>(L, L.offset(b, p.inner_blocks, m0 + m, d0 + d)) : Acc(0);
      const int c = right_along_columns ? i % kSimtTile : i / kSimtDepth;
      const int e = right_along_columns ? i / kSimtTile : i % kSimtDepth;
      const bool there = c0 + c < p.columns && d0 + e < p.depth[term];
      right[e][c] = there ? load_as<Acc>(R, R.offset(b, p.inner_blocks, d0 + e, c0 + c)) : Acc(0);
    }
  }

  __device__ void drop(int64_t d0) {
    if (p.left_mask.seed != nullptr)
      drop_tile(p.left_mask, &left[0][0], kSimtDepth + 1, kSimtTile, kSimtDepth, m0, mask_column() + d0, threadIdx.x,
                kSimtThreads);
    if (p.right_mask.seed != nullptr)
      drop_tile(p.right_mask, &right[0][0], kSimtTile + 4, kSimtDepth, kSimtTile, d0, mask_column() + c0, threadIdx.x,
                kSimtThreads);
  }

  __device__ void multiply(Sums& run) const {
#pragma unroll
    for (int d = 0; d < kSimtDepth; d++)
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) run[i][j] += left[thread_row() + i][d] * right[d][thread_column() + j];
  }

  __device__ void store_row(int64_t m, const Acc (&sum)[4]) const {
    const int64_t column = c0 + thread_column();
    const uint32_t kept =
        p.sum_mask.seed != nullptr ? p.sum_mask.kept(p.sum_mask.key(), m, mask_column() + column) : ~uint32_t(0);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (column + j >= p.columns) continue;
      Acc value = kept >> j & 1 ? Acc(p.scale) * sum[j] : Acc(0);
      if (p.base.data != nullptr) value += load_as<Acc>(p.base, p.base.offset(b, p.inner_blocks, m, column + j));
      store_as<Acc>(p.out, p.out.offset(b, p.inner_blocks, m, column + j), value);
    }
  }
};

template <class Acc>
__device__ __forceinline__ void add_run(Acc (&total)[4][4], Acc (&run)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) total[i][j] += run[i][j], run[i][j] = Acc(0);
}

template <class Acc>
__global__ void __launch_bounds__(kSimtThreads, 1) products_kernel(Products products) {
  GRALORA_SHARED(Acc, left, [kSimtTile][kSimtDepth + 1]);
  GRALORA_SHARED(Acc, right, [kSimtDepth][kSimtTile + 4]);
  int64_t tile = blockIdx.x;
  int which = 0;
  int64_t row_tiles = 0, column_tiles = 0;
  for (; which < products.count; which++) {
    row_tiles = simt_tiles(products.product[which].rows), column_tiles = simt_tiles(products.product[which].columns);
    const int64_t tiles = products.product[which].blocks * row_tiles * column_tiles;
    if (tile < tiles) break;
    tile -= tiles;
  }
  const Product& p = products.product[which];
  ProductBlock<Acc> block{p,
                          tile / (row_tiles * column_tiles),
                          tile / column_tiles % row_tiles * kSimtTile,
                          tile % column_tiles * kSimtTile,
                          left,
                          right};

  Acc total[4][4] = {};
  for (int term = 0; term < 2; term++) {
    Acc run[4][4] = {};
    for (int64_t d0 = 0; d0 < p.depth[term]; d0 += kSimtDepth) {
      block.load(term, d0);
      sync_block();
      if (p.left_mask.seed != nullptr || p.right_mask.seed != nullptr) {
        block.drop(d0);
        sync_block();
      }
      block.multiply(run);
      if ((d0 + kSimtDepth) % kSimtRun == 0 || d0 + kSimtDepth >= p.depth[term]) add_run(total, run);
      sync_block();  // all are done with the operands
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (block.m0 + block.thread_row() + i < p.rows) block.store_row(block.m0 + block.thread_row() + i, total[i]);
}

inline cudaError_t launch_products(const Products& products, bool f64, cudaStream_t stream) {
  const int64_t tiles = products.tiles();
  if (tiles == 0) return cudaSuccess;
  const dim3 grid = dim3(unsigned(tiles)), block = dim3(kSimtThreads);
  return f64 ? launch("products", products_kernel<double>, grid, block, 0, stream, products)
             : launch("products", products_kernel<float>, grid, block, 0, stream, products);
}

}  // namespace gralora::cuda
