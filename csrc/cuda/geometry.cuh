// SPDX-License-Identifier: Apache-2.0
// The tiles that all tensor-core kernels share, and how a tile of an activation comes into shared
// memory.
#pragma once

#include "mask.cuh"
#include "plan.h"

namespace gralora::cuda {

constexpr int kWarps = kTokens / 16;
constexpr int kThreads = 32 * kWarps;

// An activation [T, width] whose rows lie `stride` elements apart and are contiguous. vectors:
// rows and blocks begin at multiples of 16 bytes, and a block is whole vectors of 16 bytes.
template <class X>
struct ActivationView {
  X* data;
  int64_t stride;
  bool vectors;
};

// 16 bytes of shared memory, which lie at a multiple of 16.
template <class T>
__device__ __forceinline__ uint4 shared_vector(const T* from) {
  uint4 vector;
  memcpy(&vector, __builtin_assume_aligned(from, 16), sizeof vector);
  return vector;
}

// Rows [first, last) of an activation or of W
struct RowRange {
  int64_t first, last;
};

// Columns of one block of an activation: `from` is the first column of the tile, of w in the block
// that begins at column `block` of a row.
struct TileColumns {
  int64_t block;
  int from, w;

  __device__ int64_t in_row() const { return block + from; }
};

// kRows x kColumns elements of x from rows.first on, to shared memory, by all threads of the
// block; zeros beyond rows.last and beyond the block's columns. They are there after
// cp_async_wait.
template <int kRows, int kColumns, class X>
__device__ __forceinline__ void load_tile(X* tile, int pitch, const ActivationView<const X>& x, RowRange rows,
                                          TileColumns columns) {
  constexpr int kVector = 16 / sizeof(X), kVectors = kColumns / kVector;
  for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
    const int m = i / kVectors, c = i % kVectors * kVector;
    const int left = columns.w - columns.from - c;
    const bool inside = rows.first + m < rows.last && left > 0;
    const X* from = x.data + (rows.first + m) * x.stride + columns.in_row() + c;
    X* to = tile + m * pitch + c;
    if (x.vectors)
      cp_async_16(to, inside ? from : x.data, inside ? 16 : 0);
    else
      for (int e = 0; e < kVector; e++) to[e] = inside && e < left ? load_global(from + e) : from_float<X>(0.0f);
  }
}

// The same tile back to y; what lies outside is not written.
template <int kRows, int kColumns, class Y>
__device__ __forceinline__ void store_tile(const Y* tile, int pitch, const ActivationView<Y>& y, RowRange rows,
                                           TileColumns columns) {
  constexpr int kVector = 16 / sizeof(Y), kVectors = kColumns / kVector;
  for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
    const int m = i / kVectors, c = i % kVectors * kVector;
    const int left = columns.w - columns.from - c;
    if (rows.first + m >= rows.last || left <= 0) continue;
    Y* to = y.data + (rows.first + m) * y.stride + columns.in_row() + c;
    const Y* from = tile + m * pitch + c;
    if (y.vectors && left >= kVector)
      store_global(reinterpret_cast<uint4*>(to), shared_vector(from));
    else
      for (int e = 0; e < kVector && e < left; e++) store_global(to + e, from[e]);
  }
}

}  // namespace gralora::cuda
