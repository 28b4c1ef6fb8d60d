// SPDX-License-Identifier: Apache-2.0
// backward for a few tokens, where the parameters and their gradients are nearly all of the
// traffic: no packing, no transposing. For adapters whose rows lie in one run.
//
//   an item of pass B, some ranks of a block:     dU_j[t, c] = s sum_o g_j[t, o] B_j[c, o];   dB_j[c, o] = s sum_t U_j[t, c] g_j[t, o]
//     or some rows of Bg:                         their part of dHg[t, c] = s sum_m g[t, m] Bg[m, c];   dBg[m, c] = s sum_t Ug[t, c] g[t, m]
//   an item of pass A, some columns of a block:   dx_n[t, i] = sum_c dH_n[t, c] A_n[i, c];    dA_n[i, c] = sum_t x'_n[t, i] dH_n[t, c]
//     and of Ag:                                  dx[t, i] += sum_c dHg[t, c] Ag[c, i];       dAg[c, i] = sum_t dHg[t, c] x'[t, i]
//
// Every parameter is read once, along its rows, and its gradient is written beside it. Each sum
// belongs to one item, but those of dHg, whose parts are added in their order.
#pragma once

#include "few_tokens.h"
#include "project.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct BackwardFew {
  const BackwardParams& p;
  const BackwardPlan& plan;
  const Shape& s = p.shape;
  const int64_t row = s.k * s.r + s.h, w_in = s.N / s.k, w_out = s.M / s.k;
  const Mask mask = Mask(p.dropout);
  Scratch scratch{};
  Acc* g = scratch.take<Acc>(kFewTokens * s.M);  // rows beyond T are zeros, so are those of u and dH
  Acc* u = scratch.take<Acc>(kFewTokens * row);  // s U
  Acc* dH = scratch.take<Acc>(kFewTokens * row);
  const int64_t general_row = round_up(s.h, kWidth<Acc>), general_chunks = s.h > 0 ? ceil_div(s.M, kMostColumns) : 0;
  Acc* partial = scratch.take<Acc>(general_chunks * kFewTokens * general_row);  // of dHg
  PerThread<Acc> buffers{scratch, plan.threads, Block<Acc>::size(kFewTokens) + kFewTokens * kBlockRow<Acc>};

  void run() {
    read_tokens();
    const bool want_x = p.grad_x.data != nullptr;
    const bool want_H = want_x || p.grad.A.data != nullptr || p.grad.A_general.data != nullptr;
    const int64_t chunks = ceil_div(w_in, kMostColumns);
    for_dtype<Acc>(p.adapter.B.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      for_few_tokens(s.T, [&](auto tokens) {
        constexpr int T = tokens.value, kRanks = together(T);
        const int64_t groups = ceil_div(s.r, kRanks);
        parallel_items(s.k * groups + general_chunks, plan.threads, [&](int64_t item, int) {
          const int64_t j = item / groups, c = item % groups * kRanks;
          if (j >= s.k) return pass_B_general<T, P>(item - s.k * groups, want_H);
          if (c + kRanks <= s.r) return pass_B<T, kRanks, P>(j, c, want_H);
          for (int64_t last = c; last < s.r; last++) pass_B<T, 1, P>(j, last, want_H);
        });
        if (!want_H) return;
        add_general();
        parallel_items(s.k * chunks, plan.threads, [&](int64_t item, int thread) {
          const int64_t first = item % chunks * kMostColumns;
          pass_A<T, P>(item / chunks, first, smaller(kMostColumns, w_in - first), buffers.of(thread));
        });
      });
    });
  }

 private:
  // Rows of a parameter that are taken together: sums of them and of T tokens fill a vector's
  // lanes.
  static constexpr int together(int T) {
    constexpr int W = kWidth<Acc>;
    return T >= W ? 1 : W / T < 4 ? W / T : 4;
  }

  // g and s U in the accumulation type; U again, where forward did not keep it
  void read_tokens() {
    for_dtype<Acc>(p.grad_y.dtype, [&](auto* type) {
      using G = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < s.T; t++)
        convert_row<Acc>(static_cast<const G*>(p.grad_y.data) + row_offset(p.grad_y, t), p.grad_y.column_stride, s.M,
                         g + t * s.M);
    });
    if (p.grad.B.data != nullptr || p.grad.B_general.data != nullptr) {
      if (plan.remakes_U)
        remake_u();
      else if (p.u_bf16)
        convert_row<Acc>(static_cast<const bf16*>(p.u), 1, s.T * row, u);
      else
        memcpy(u, p.u, size_t(s.T * row) * sizeof(Acc));
      for (int64_t i = 0; i < s.T * row; i++) u[i] *= Acc(p.scaling);
    }
    for (int64_t i = s.T * s.M; i < kFewTokens * s.M; i++) g[i] = Acc(0);
    for (int64_t i = s.T * row; i < kFewTokens * row; i++) u[i] = dH[i] = Acc(0);
  }

  void remake_u() {
    const auto project = project_x<Fp32<Acc>>(p, plan.A_for_U, plan.A_general_for_U, plan.x, plan.chunks_of_x);
    project.run_segment(0, s.T, 1, u, scratch.take<Acc>(project.segment_scratch(s.T, 1)));
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

  // Rows of Bg, a chunk of columns of g
  template <int T, class P>
  void pass_B_general(int64_t chunk, bool want_H) const {
    const int64_t first = chunk * kMostColumns, count = smaller(kMostColumns, s.M - first);
    const Param &from = p.adapter.B_general, &to = p.grad.B_general;
    const P* b = static_cast<const P*>(from.data) + first * from.row_stride;
    Acc* sum = partial + chunk * kFewTokens * general_row;
    const Acc* rows[T];
    rows_of(g + first, s.M, s.T, rows);
    for (int64_t c = 0; want_H && c < s.h; c += kWidth<Acc>)
      sum_rows<1, kSumsOfRows>(rows, s.T, count, b + c, from.row_stride, kAhead * from.row_stride, sum + c, general_row,
                               s.h - c);
    if (to.data != nullptr)
      outer_all_rows<T>(g + first, s.M, count, u + s.k * s.r, row, s.h,
                        static_cast<P*>(to.data) + first * to.row_stride, to.row_stride);
  }

  // dHg from its parts
  void add_general() const {
    for (int64_t t = 0; t < s.T; t++)
      for (int64_t c = 0; c < s.h; c++) {
        Acc sum = 0;
        for (int64_t chunk = 0; chunk < general_chunks; chunk++)
          sum += partial[(chunk * kFewTokens + t) * general_row + c];
        dH[t * row + s.k * s.r + c] = Acc(p.scaling) * sum;
      }
  }

  // Columns [first, first + columns) of block n
  template <int T, class P>
  void pass_A(int64_t n, int64_t first, int64_t columns, Acc* buffer) const {
    constexpr int64_t W = kWidth<Acc>, kRows = T >= W ? 1 : W / T;
    const bool want_A = p.grad.A.data != nullptr, want_general = s.h > 0 && p.grad.A_general.data != nullptr;
    const bool want_x = p.grad_x.data != nullptr;
    const int64_t column = n * w_in + first;
    const Block<Acc> block(buffer, kFewTokens);
    Acc* dx = buffer + Block<Acc>::size(kFewTokens);
    if (want_A || want_general || mask.on) copy_rows<Acc>({p.x, mask, s.N, 0, s.T, column, columns}, block);
    for (int64_t t = s.T; t < T; t++) memset(block.rows + t * kBlockRow<Acc>, 0, sizeof(Acc) * kBlockRow<Acc>);
    const Acc *h = dH + n * s.r, *general = dH + s.k * s.r;
    const Param &A = p.adapter.A, &dA = p.grad.A, &Ag = p.adapter.A_general, &dAg = p.grad.A_general;
    if (want_x) {
      const P* a = static_cast<const P*>(A.data) + n * A.block_stride + first * A.row_stride;
      dot_all_rows<kRows, T>(a, A.row_stride, columns, s.r, h, row, dx, kBlockRow<Acc>);
      const Acc* rows[T];
      rows_of(general, row, s.T, rows);
      for (int64_t i = 0; s.h > 0 && i < columns; i += W)
        sum_rows<1, 1>(rows, s.T, s.h, static_cast<const P*>(Ag.data) + column + i, Ag.row_stride, W, dx + i,
                       kBlockRow<Acc>, columns - i, true);
    }
    if (want_A)
      outer_all_rows<T>(block.rows, kBlockRow<Acc>, columns, h, row, s.r,
                        static_cast<P*>(dA.data) + n * dA.block_stride + first * dA.row_stride, dA.row_stride);
    if (want_general)
      outer_all_rows<T>(general, row, s.h, block.rows, kBlockRow<Acc>, columns, static_cast<P*>(dAg.data) + column,
                        dAg.row_stride);
    if (want_x) store_x(column, columns, dx, block.mask);
  }

  void store_x(int64_t column, int64_t columns, Acc* dx, const uint8_t* bits) const {
    for_dtype<Acc>(p.grad_x.dtype, [&](auto* type) {
      using X = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < s.T; t++) {
        X* to = static_cast<X*>(p.grad_x.data) + row_offset(p.grad_x, t) + column * p.grad_x.column_stride;
        for (int64_t i = 0; i < columns; i += kWidth<Acc>) {
          Vec<Acc> value = load<Acc>(dx + t * kBlockRow<Acc> + i);
          if (mask.on) value = Mask::drop<Acc>(value * Acc(mask.keep_scale), bits + t * kMaskRow, i);
          if (p.grad_x.column_stride == 1)
            store_some<Acc>(to + i, value, columns - i);
          else
            for (int64_t lane = 0; lane < smaller(kWidth<Acc>, columns - i); lane++)
              to[(i + lane) * p.grad_x.column_stride] = from_acc<X>(Acc(value[lane]));
        }
      }
    });
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
