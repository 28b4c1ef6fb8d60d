// SPDX-License-Identifier: Apache-2.0
// The vocabulary that ops, CPU kernels and CUDA kernels share: plain structs, no torch, no CUDA
// headers.
//
//   T  tokens: all leading dimensions of x flattened    k  the grid is k x k blocks
//   N  in_features          M  out_features             r  rank of the adapter, rb = r/k a block's
//   h  rank of the plain LoRA beside it (0: none)       s  scaling
//
//   H[t,n,c] = sum_i x[t, n*N/k + i] * A[n,i,c]
//   U[t,j,n*rb+q] = H[t,n,j*rb+q]   (the block exchange)
//   y[t, j*M/k + o] = base[t, j*M/k + o] + s * sum_c U[t,j,c] * B[j,c,o]  (+ s * (x Ag^T) Bg^T)
//
// Sums are taken in the accumulation type: float, or double where any tensor is float64.
#pragma once

#include <cstdint>

namespace gralora {

enum class DType : int8_t { f32, bf16, f16, f64 };

constexpr int kMaxLeadingDims = 8;

// An activation [T, width] of any strides: T is `sizes` flattened (row-major), strides are in
// elements.
struct Activation {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t column_stride = 1;
  int leading_dims = 0;
  int64_t sizes[kMaxLeadingDims] = {};
  int64_t strides[kMaxLeadingDims] = {};
};

// A parameter [blocks, rows, columns] of any strides (elements); data == nullptr: absent.
struct Param {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t block_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// Views of a parameter: transposed; and of one of the general part, as blocks along its wide
// dimension. Static: the kernels of each instruction set compile copies of their own.
static inline Param transposed(Param p) {
  const int64_t row_stride = p.row_stride;
  p.row_stride = p.column_stride, p.column_stride = row_stride;
  return p;
}
static inline Param blocks_of_rows(Param p, int64_t rows_per_block) {
  p.block_stride = rows_per_block * p.row_stride;
  return p;
}
static inline Param blocks_of_columns(Param p, int64_t columns_per_block) {
  p.block_stride = columns_per_block * p.column_stride;
  return p;
}

struct Shape {
  int64_t T = 0, N = 0, M = 0, k = 1, r = 1, h = 0;
};

// Inverted dropout on x with the mask of Philox-4x32-10 over (seed, row-major element index);
// p == 0: off.
struct Dropout {
  double p = 0.0;
  const int64_t* seed = nullptr;  // one element, on the tensors' device
  // The CPU's kernels only, where a block's width is whole bytes: the mask as bits [T, N/8], which
  // forward writes and backward reads instead of drawing it again. Element i is kept where bit
  // i % 8 of byte i / 8 of its row is set. Null: none.
  uint8_t* kept = nullptr;
  bool drawn = false;  // kept holds the mask
};

// Parameters in the layout of PEFT: A [k, N/k, r], B [k, r, M/k], A_general [1, h, N], B_general
// [1, M, h].
struct Adapter {
  Param A, B, A_general, B_general;
};

// y = base + ..., y may be base; writes u [T, k*r + h] (contiguous): U, then x Ag^T.
struct ForwardParams {
  Shape shape;
  Adapter adapter;
  Activation x, base, y;
  void* u = nullptr;
  bool u_bf16 = false;  // u is bfloat16, not of the accumulation type; the CPU's kernels only
  double scaling = 1.0;
  Dropout dropout;
  bool accumulate_f64 = false;
  int threads = 1;
};

// Writes (=) the gradients whose data is not null. u is as forward wrote it. Where it is null, which
// it must not be with u_bf16, it is made again from x.
struct BackwardParams {
  Shape shape;
  Adapter adapter;
  Activation grad_y, x, grad_x;
  bool add_to_grad_x = false;  // += instead
  const void* u = nullptr;
  bool u_bf16 = false;
  Adapter grad;
  double scaling = 1.0;
  Dropout dropout;
  bool accumulate_f64 = false;
  int threads = 1;
};

// W[j*M/k + o, n*N/k + i] (+)= s * sum_q A[n,i,j*rb+q] * B[j,n*rb+q,o]  (+ s * Bg Ag); W is [M, N]
// by its strides.
struct MergeParams {
  Shape shape;  // T is not used
  Adapter adapter;
  Param weight;            // block_stride is not used
  bool accumulate = true;  // false: W is overwritten, never read
  double scaling = 1.0;
  bool accumulate_f64 = false;
  int threads = 1;
};

// An adapter of several that are merged one after the other
struct MergedAdapter {
  Shape shape;  // T is not used
  Adapter adapter;
  double scaling = 1.0;
};

// What a merge with codes has found out; the checksums are those of cpu/codes.h.
struct CodedResult {
  uint64_t before = 0, after = 0;  // checksums
  int64_t listed = 0;              // exceptions; -1: there was no room for them, and nothing is merged
  int64_t first_not_finite = 0;    // the first adapter after which a weight is not finite; `count` where there
                                   // is none or finds_broken is off
};

// A merge that is taken off again bit for bit (cpu/coded_merge.cpp). Sums are in double where the
// weight is float64; adapters are float64 only there.
struct CodedParams {
  int64_t N = 0, M = 0;
  const MergedAdapter* adapters = nullptr;
  int64_t count = 0;  // of adapters
  Param weight;       // [M, N] by its strides; block_stride is not used
  Param to;           // as `weight`, or `weight` itself: what is written
  int8_t* codes = nullptr;
  // The exceptions: where a weight lies, counted along the rows that codes follow, and its bits
  int32_t* places = nullptr;
  void* values = nullptr;
  int64_t capacity = 0;       // room for so many
  bool finds_broken = false;  // the first adapter after which a weight is not finite
  CodedResult* result = nullptr;
  int threads = 1;
};

// out = in (W + dW)^T + bias, with in [T, N] and out [T, M]; or, `transposed`, out = in (W + dW),
// with in [T, M] and out [T, N]. r == 0 and h == 0: there is no dW, and the adapter is not read.
struct LinearParams {
  Shape shape;
  Adapter adapter;
  Activation in, out;          // of the accumulation type; out is contiguous
  Param weight;                // [M, N] by its strides; block_stride is not used
  const void* bias = nullptr;  // [columns of out], of the accumulation type, or none
  bool transposed = false;
  double scaling = 1.0;
  bool accumulate_f64 = false;
  int threads = 1;
};

namespace cpu {
void forward(const ForwardParams& p);
void backward(const BackwardParams& p);
void merge(const MergeParams& p);
void linear(const LinearParams& p);
void merge_coded(const CodedParams& p);
void unmerge_coded(const CodedParams& p);  // reads result->listed, writes result->before
void checksums(const CodedParams& p);      // of `weight`, as before and as after
}  // namespace cpu

}  // namespace gralora
