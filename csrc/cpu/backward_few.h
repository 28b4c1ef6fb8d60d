// SPDX-License-Identifier: Apache-2.0
// backward for one to four tokens, without a general part. Reading the parameters and writing
// their gradients is nearly all of the work, so they are neither packed nor transposed. Their rows
// must be contiguous.
//
//   an item of the pass over B, some ranks of a block:
//     dU_j[t, c] = s sum_o g_j[t, o] B_j[c, o];   dB_j[c, o] = s sum_t U_j[t, c] g_j[t, o]
//   an item of the pass over A, some columns of a block:
//     dx_n[t, i] = sum_c dH_n[t, c] A_n[i, c];    dA_n[i, c] = sum_t x'_n[t, i] dH_n[t, c]
//
// Every parameter is read once, along its rows, and its gradient is written along with it. Each
// sum belongs to one item.
#pragma once

#include "few_tokens.h"
#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct BackwardFew {
  const BackwardParams& p;
  const BackwardPlan& plan;
  const Shape& s = p.shape;
  const int64_t row = s.k * s.r, w_out = s.M / s.k;
  const Mask mask = Mask(p.dropout);
  Scratch scratch{};
  // Rows from T on are zeros.
  Acc* g = scratch.take<Acc>(kFewTokens * s.M);
  Acc* u = scratch.take<Acc>(kFewTokens * row);  // s U
  Acc* dH = scratch.take<Acc>(kFewTokens * row);
  PerThread<Acc> buffers{scratch, plan.threads, RowBuffer<Acc>::size(kFewTokens) + kFewTokens * kBufferRow<Acc>};

  void run() {
    read_tokens();
    const bool want_H = p.grad_x.data != nullptr || p.grad.A.data != nullptr;
    const Chunks& chunks = plan.chunks_of_x;
    for_dtype<Acc>(p.adapter.B.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      for_few_tokens(s.T, [&](auto tokens) {
        constexpr int T = tokens.value, kRanks = together(T);
        const int64_t groups = ceil_div(s.r, kRanks);
        parallel_items(s.k * groups, plan.threads, [&](int64_t item, int) {
          const int64_t j = item / groups, c = item % groups * kRanks;
          if (c + kRanks <= s.r) return pass_B<T, kRanks, P>(j, c, want_H);
          for (int64_t last = c; last < s.r; last++) pass_B<T, 1, P>(j, last, want_H);
        });
        if (!want_H) return;
        parallel_items(chunks.count, plan.threads,
                       [&](int64_t chunk, int thread) { pass_A<T, P>(chunk, buffers.of(thread)); });
      });
    });
  }

 private:
  // Rows of a parameter that are read together: as many as give, with T tokens each, a sum for
  // each lane of a vector, but at most four.
  static constexpr int together(int T) {
    constexpr int W = kWidth<Acc>;
    return T >= W ? 1 : W / T < 4 ? W / T : 4;
  }

  // Reads g and s U into the accumulation type.
  void read_tokens() {
    for_dtype<Acc>(p.grad_y.dtype, [&](auto* type) {
      using G = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < s.T; t++)
        convert_row<Acc>(static_cast<const G*>(p.grad_y.data) + row_offset(p.grad_y, t), p.grad_y.column_stride, s.M,
                         g + t * s.M);
    });
    if (p.grad.B.data != nullptr) {
      if (p.u_bf16)
        convert_row<Acc>(static_cast<const bf16*>(p.u), 1, s.T * row, u);
      else
        memcpy(u, p.u, size_t(s.T * row) * sizeof(Acc));
      for (int64_t i = 0; i < s.T * row; i++) u[i] *= Acc(p.scaling);
    }
    for (int64_t i = s.T * s.M; i < kFewTokens * s.M; i++) g[i] = Acc(0);
    for (int64_t i = s.T * row; i < kFewTokens * row; i++) u[i] = dH[i] = Acc(0);
  }

  // Ranks [c, c + R) of block j
  template <int T, int R, class P>
  void pass_B(int64_t j, int64_t c, bool want_H) const {
    constexpr int64_t W = kWidth<Acc>;
    const bool want_B = p.grad.B.data != nullptr;
    const Param &from = p.adapter.B, &to = p.grad.B;
    const P* b = static_cast<const P*>(from.data) + j * from.block_stride + c * from.row_stride;
    P* db = static_cast<P*>(to.data) + (want_B ? j * to.block_stride + c * to.row_stride : 0);
    const Acc* g_j = g + j * w_out;
    Acc ranks[R][T];
    for (int q = 0; q < R; q++)
      for (int t = 0; t < T; t++) ranks[q][t] = u[t * row + j * s.r + c + q];
    Vec<Acc> sum[R * T] = {};
    const auto add = [&](auto whole, int64_t o) __attribute__((always_inline)) {
      const int64_t left = w_out - o;
      Vec<Acc> g_o[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; t++)
        g_o[t] = whole.value ? load<Acc>(g_j + t * s.M + o) : load_some<Acc>(g_j + t * s.M + o, left);
      if (want_H)
        for_sums<R, 1>([&](int q, int) {
          const P* at = b + q * from.row_stride + o;
          const Vec<Acc> b_o = whole.value ? load<Acc>(at) : load_some<Acc>(at, left);
#pragma GCC unroll 4
          for (int t = 0; t < T; t++) sum[q * T + t] += g_o[t] * b_o;
        });
      if (want_B)
        for_sums<R, 1>([&](int q, int) {
          Vec<Acc> gradient{};
#pragma GCC unroll 4
          for (int t = 0; t < T; t++) gradient += ranks[q][t] * g_o[t];
          P* at = db + q * to.row_stride + o;
          whole.value ? store<Acc>(at, gradient) : store_some<Acc>(at, gradient, left);
        });
    };
    int64_t o = 0;
    for (; o + W <= w_out; o += W) add(Int<1>{}, o);
    if (o < w_out) add(Int<0>{}, o);
    const int64_t rb = s.r / s.k;
    Acc totals[R * T];
    total_lanes<Acc>(sum, totals);
    for_sums<R, T>([&](int q, int t) {
      if (t < s.T) dH[t * row + (c + q) / rb * s.r + j * rb + (c + q) % rb] = Acc(p.scaling) * totals[q * T + t];
    });
  }

  // A chunk of columns of x
  template <int T, class P>
  void pass_A(int64_t chunk, Acc* own) const {
    constexpr int64_t kRows = T >= kWidth<Acc> ? 1 : kWidth<Acc> / T;
    const bool want_A = p.grad.A.data != nullptr, want_x = p.grad_x.data != nullptr;
    const int64_t n = plan.chunks_of_x.block(chunk), first = plan.chunks_of_x.first(chunk);
    const Part part{p.x, mask, s.N, 0, s.T, plan.chunks_of_x.column(chunk), plan.chunks_of_x.length(chunk)};
    const RowBuffer<Acc> buffer(own, kFewTokens);
    Acc* dx = own + RowBuffer<Acc>::size(kFewTokens);
    if (want_A || mask.on) copy_rows<Acc>(part, buffer);
    for (int64_t t = s.T; t < T; t++) memset(buffer.rows + t * kBufferRow<Acc>, 0, sizeof(Acc) * kBufferRow<Acc>);
    const Acc* h = dH + n * s.r;
    const Param &A = p.adapter.A, &dA = p.grad.A;
    if (want_A)
      outer_all_rows<T>(buffer.rows, kBufferRow<Acc>, part.columns, h, row, s.r,
                        static_cast<P*>(dA.data) + n * dA.block_stride + first * dA.row_stride, dA.row_stride);
    if (!want_x) return;
    dot_all_rows<kRows, T>(static_cast<const P*>(A.data) + n * A.block_stride + first * A.row_stride, A.row_stride,
                           part.columns, s.r, h, row, dx, kBufferRow<Acc>);
    store_x(part, dx, buffer.mask);
  }

  void store_x(const Part& part, Acc* dx, const uint8_t* bits) const {
    for_dtype<Acc>(p.grad_x.dtype, [&](auto* type) {
      using X = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < s.T; t++) {
        X* to = static_cast<X*>(p.grad_x.data) + row_offset(p.grad_x, t) + part.column;
        for (int64_t i = 0; i < part.columns; i += kWidth<Acc>) {
          Vec<Acc> value = load<Acc>(dx + t * kBufferRow<Acc> + i);
          if (mask.on) value = Mask::drop<Acc>(value * Acc(mask.keep_scale), bits + t * kMaskRow, i);
          store_some<Acc>(to + i, value, part.columns - i);
        }
      }
    });
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
