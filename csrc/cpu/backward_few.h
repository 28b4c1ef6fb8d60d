// backward for a few tokens, where the parameters and their gradients are nearly all of the traffic: no packing, no sums
// between threads. For adapters without a general part whose rows lie in one run.
//
//   an item of pass B, some ranks of a block:       dU_j[t, c] = s sum_o g_j[t, o] B_j[c, o];   dB_j[c, o] = s sum_t U_j[t, c] g_j[t, o]
//   an item of pass A, some columns of a block:     dx_n[t, i] = sum_c dH_n[t, c] A_n[i, c];    dA_n[i, c] = sum_t x'_n[t, i] dH_n[t, c]
//
// Every parameter is read once, along its rows, and its gradient is written beside it. Each sum belongs to one item.
#pragma once

#include "few_tokens.h"
#include "project.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct BackwardFew {
  const BackwardParams& p;
  const Shape& s = p.shape;
  const int64_t row = s.k * s.r, w_in = s.N / s.k, w_out = s.M / s.k;
  const Mask mask = Mask(p.dropout);
  Scratch scratch{};
  Acc* g = scratch.take<Acc>(kFewTokens * s.M);  // rows beyond T are zeros, so are those of u and dH
  Acc* u = scratch.take<Acc>(kFewTokens * row);
  Acc* dH = scratch.take<Acc>(kFewTokens * row);
  PerThread<Acc> buffers{scratch, p.threads, Block<Acc>::size(kFewTokens) + kFewTokens * kRow<Acc>};

  static bool fits(const BackwardParams& p) {
    const auto in_rows = [](const Param& parameter, const Param& gradient) {
      return parameter.column_stride == 1 &&
             (gradient.data == nullptr || (gradient.column_stride == 1 && gradient.dtype == parameter.dtype));
    };
    return p.shape.T > 0 && p.shape.T <= kFewTokens && p.shape.h == 0 && !p.add_to_grad_x &&
           in_rows(p.adapter.A, p.grad.A) && in_rows(p.adapter.B, p.grad.B);
  }

  void run() {
    read_tokens();
    const bool want_x = p.grad_x.data != nullptr, want_H = want_x || p.grad.A.data != nullptr;
    const int64_t chunks = ceil_div(w_in, kChunk);
    for_dtype<Acc>(p.adapter.B.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      for_few_tokens(s.T, [&](auto tokens) {
        constexpr int kRanks = together(tokens.value);
        const int64_t groups = ceil_div(s.r, kRanks);
        parallel_items(s.k * groups, p.threads, [&](int64_t item, int) {
          const int64_t j = item / groups, c = item % groups * kRanks;
          if (c + kRanks <= s.r) return pass_B<tokens.value, kRanks, P>(j, c, want_H);
          for (int64_t last = c; last < s.r; last++) pass_B<tokens.value, 1, P>(j, last, want_H);
        });
      });
    });
    if (!want_H) return;
    for_dtype<Acc>(p.adapter.A.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      for_few_tokens(s.T, [&](auto tokens) {
        parallel_items(s.k * chunks, p.threads, [&](int64_t item, int thread) {
          const int64_t first = item % chunks * kChunk;
          pass_A<tokens.value, P>(item / chunks, first, smaller(kChunk, w_in - first), buffers.of(thread));
        });
      });
    });
  }

 private:
  // Rows of a parameter that are taken together: sums of them and of T tokens fill a vector's lanes.
  static constexpr int together(int T) {
    constexpr int W = kWidth<Acc>;
    return T >= W ? 1 : W / T < 4 ? W / T : 4;
  }

  // g and U in the accumulation type; U again, where forward did not keep it
  void read_tokens() {
    for_dtype<Acc>(p.grad_y.dtype, [&](auto* type) {
      using G = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < s.T; t++)
        convert_row<Acc>(static_cast<const G*>(p.grad_y.data) + row_offset(p.grad_y, t), p.grad_y.column_stride, s.M,
                         g + t * s.M);
    });
    if (p.grad.B.data != nullptr && p.u == nullptr) {
      const Project<Acc, Singles<Acc>> project{s.N, s.k, s.r, 0, p.x, mask, p.adapter.A, Param{}, Acc(1)};
      project.run_segment(0, s.T, u, scratch.take<Acc>(project.segment_scratch(s.T)));
    } else if (p.grad.B.data != nullptr && p.u_bf16) {
      convert_row<Acc>(static_cast<const bf16*>(p.u), 1, s.T * row, u);
    } else if (p.grad.B.data != nullptr) {
      memcpy(u, p.u, size_t(s.T * row) * sizeof(Acc));
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
      for (int t = 0; t < T; t++) ranks[q][t] = Acc(p.scaling) * u[t * row + j * s.r + c + q];
    Vec<Acc> sum[R * T] = {};
    const auto add = [&](auto whole, int64_t o) __attribute__((always_inline)) {
      const int64_t left = w_out - o;
      Vec<Acc> g_o[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; t++)
        g_o[t] = whole.value ? load<Acc>(g_j + t * s.M + o) : load_some<Acc>(g_j + t * s.M + o, left);
      if (want_H)
        for_accumulators<R, 1>([&](int q, int) {
          const P* at = b + q * from.row_stride + o;
          const Vec<Acc> b_o = whole.value ? load<Acc>(at) : load_some<Acc>(at, left);
#pragma GCC unroll 4
          for (int t = 0; t < T; t++) sum[q * T + t] += g_o[t] * b_o;
        });
      if (want_B)
        for_accumulators<R, 1>([&](int q, int) {
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
    for_accumulators<R, T>([&](int q, int t) {
      if (t < s.T) dH[t * row + (c + q) / rb * s.r + j * rb + (c + q) % rb] = Acc(p.scaling) * totals[q * T + t];
    });
  }

  // Columns [first, first + columns) of block n
  template <int T, class P>
  void pass_A(int64_t n, int64_t first, int64_t columns, Acc* buffer) const {
    const bool want_A = p.grad.A.data != nullptr, want_x = p.grad_x.data != nullptr;
    const Block<Acc> block(buffer, kFewTokens);
    Acc* dx = buffer + Block<Acc>::size(kFewTokens);
    if (want_A || mask.on) read_block<Acc>(p.x, 0, s.T, n * w_in + first, columns, s.N, mask, block);
    for (int64_t t = s.T; t < T; t++) memset(block.rows + t * kRow<Acc>, 0, sizeof(Acc) * kRow<Acc>);
    const Param &from = p.adapter.A, &to = p.grad.A;
    const P* a = static_cast<const P*>(from.data) + n * from.block_stride + first * from.row_stride;
    P* da = static_cast<P*>(to.data) + (want_A ? n * to.block_stride + first * to.row_stride : 0);
    const Acc* h = dH + n * s.r;
    constexpr int64_t W = kWidth<Acc>, kRows = T >= W ? 1 : W / T;
    if (want_x) dot_all_rows<kRows, T>(a, from.row_stride, columns, s.r, h, row, dx, kRow<Acc>);
    for (int64_t c = 0; want_A && c < s.r;) {
      constexpr int kWide = kVectorRegisters == 32 ? 4 : 2;
      if (c + kWide * W <= s.r)
        outer_rows<T, kWide>(block.rows, columns, h + c, kWide * W, da + c, to.row_stride), c += kWide * W;
      else
        outer_rows<T, 1>(block.rows, columns, h + c, s.r - c, da + c, to.row_stride), c += W;
    }
    if (want_x) store_x(n * w_in + first, columns, dx, block.kept);
  }

  // to[m*stride + c] = sum_t x[t][m] h[t][c]      m < columns, c < ranks, at most NV vectors of them
  template <int T, int NV, class P>
  void outer_rows(const Acc* x, int64_t columns, const Acc* h, int64_t ranks, P* to, int64_t stride) const {
    constexpr int64_t W = kWidth<Acc>;
    Vec<Acc> ranks_of[T][NV];
    for_accumulators<T, NV>([&](int t, int v) { ranks_of[t][v] = load_some<Acc>(h + t * row + v * W, ranks - v * W); });
    for (int64_t m = 0; m < columns; m++, to += stride) {
      Vec<Acc> gradient[NV] = {};
      for_accumulators<T, NV>([&](int t, int v) { gradient[v] += x[t * kRow<Acc> + m] * ranks_of[t][v]; });
      if constexpr (NV == 1) {
        store_some<Acc>(to, gradient[0], ranks);
      } else {
#pragma GCC unroll 2
        for (int v = 0; v < NV; v += 2) {
          const Vec<Acc> both[2] = {gradient[v], gradient[v + 1]};
          store_row<Acc, P, 2>(to + v * W, both);
        }
      }
    }
  }

  void store_x(int64_t column, int64_t columns, Acc* dx, const uint8_t* kept) const {
    for_dtype<Acc>(p.grad_x.dtype, [&](auto* type) {
      using X = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < s.T; t++) {
        X* to = static_cast<X*>(p.grad_x.data) + row_offset(p.grad_x, t) + column * p.grad_x.column_stride;
        for (int64_t i = 0; i < columns; i += kWidth<Acc>) {
          Vec<Acc> value = load<Acc>(dx + t * kRow<Acc> + i);
          if (mask.on) value = mask.drop<Acc>(value, kept + t * kKept, i);
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
