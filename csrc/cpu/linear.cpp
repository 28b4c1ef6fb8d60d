// SPDX-License-Identifier: Apache-2.0
// linear: out = in P + bias. P = W + dW is computed panel by panel, while it is packed for the
// micro-kernel.
//
//   out[t, c] = bias[c] + sum_p in[t, p] * P[p, c]
//   P[a*H + i, b*V + c] = W[...]
//       + s * ( sum_q L[a][b*rb + q, i] * R[b][a*rb + q, c]  +  sum_g Lg[a][g, i] * Rg[b][g, c] )
//
// H = rows/k, V = columns/k. For y, in = x, P = (W + dW)^T, L = A^T and R = B. For dx, in = g, P =
// W + dW, L = B and R = A^T. The adapter costs r/k multiply-adds for each weight in each segment,
// and nothing for each token: there are no latents, and neither base nor y is read.
//
// An item is a strip of columns for a segment of tokens. Some chunks of its part of P are in L2 at
// a time, as a panel. plan.tokens_together tokens are multiplied by one chunk after the other, and
// share each of its micro-panels in L1. Every sum is taken chunk by chunk, in the order of the
// chunks, whatever the items are.
#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc>
struct Linear {
  const LinearPlan& plan;
  int64_t T, rows, columns, k, r, h;  // P is [rows, columns]
  Activation in, out;
  Param W;
  Param L, Lg;  // [k, r, H], [k, h, H]
  Param R, Rg;  // [k, r, V], [k, h, V]
  const Acc* bias;
  Acc scale;

  void run() const {
    const int64_t strips = ceil_div(columns, plan.strip),
                  panel = plan.chunks_per_panel * plan.chunks.columns * plan.strip;
    const int64_t ranks = larger(r / k, h) * (plan.strip + 2 * (plan.chunks.columns + kNR<Acc>));
    Scratch scratch;
    const PerThread<Acc> buffers(scratch, plan.threads, panel + ranks + RowBuffer<Acc>::size(plan.tokens_together));
    parallel_items(strips * ceil_div(T, plan.segment), plan.threads, [&](int64_t i, int thread) {
      const int64_t c0 = i % strips * plan.strip, t0 = i / strips * plan.segment;
      Acc* own = buffers.of(thread);
      const Item item{c0,
                      smaller(plan.strip, columns - c0),
                      t0,
                      smaller(plan.segment, T - t0),
                      own,
                      own + panel,
                      RowBuffer<Acc>(own + panel + ranks, plan.tokens_together)};
      for (int64_t begin = 0; begin < plan.chunks.count; begin += plan.chunks_per_panel)
        run_chunks(item, begin, smaller(begin + plan.chunks_per_panel, plan.chunks.count));
    });
  }

 private:
  struct Item {
    int64_t c0, width, t0, count;  // columns [c0, c0 + width) of tokens [t0, t0 + count)
    Acc *panel, *ranks;
    RowBuffer<Acc> buffer;
  };

  void run_chunks(const Item& item, int64_t begin, int64_t end) const {
    for (int64_t chunk = begin; chunk < end; chunk++) make_panel(item, chunk, panel_of(item, chunk - begin));
    const Mask no_mask{Dropout{}};
    for (int64_t m = 0; m < item.count; m += plan.tokens_together) {
      const int64_t tokens = smaller(plan.tokens_together, item.count - m);
      for (int64_t chunk = begin; chunk < end; chunk++) {
        const Part part{in, no_mask, rows, item.t0 + m, tokens, plan.chunks.first(chunk), plan.chunks.length(chunk)};
        multiply_chunk(item, read_rows<Acc>(plan.in, part, item.buffer), chunk, panel_of(item, chunk - begin), m,
                       tokens);
      }
    }
  }

  Acc* panel_of(const Item& item, int64_t chunk) const {
    return item.panel + chunk * plan.chunks.columns * round_up(item.width, kNR<Acc>);
  }

  // ------------------------------------------------------------------ P

  // Computes the panel of an item and a chunk: rows of the chunk and columns of the item, in
  // micro-panels of kNR columns, the last one padded with zeros.
  void make_panel(const Item& item, int64_t chunk, Acc* panel) const {
    const int64_t first = plan.chunks.first(chunk), length = plan.chunks.length(chunk), H = rows / k, V = columns / k,
                  rb = r / k;
    const int64_t c0 = item.c0, width = item.width;
    pack_panel<Acc>({W, 0, first, length, c0, width}, panel);
    for (int64_t a = first / H; a * H < first + length; a++) {
      const int64_t row = larger(first, a * H), count = smaller(first + length, (a + 1) * H) - row;
      for (int64_t b = c0 / V; b * V < c0 + width; b++) {
        const int64_t column = larger(c0, b * V), of_block = smaller(c0 + width, (b + 1) * V) - column;
        const auto add = [&](const Param& left, Packing packing, int64_t left0, const Param& right, int64_t right0,
                             int64_t n) {
          Acc *packed = item.ranks, *packed_left = packed + n * round_up(width, kNR<Acc>);
          pack_right({right, b, right0, n, column - b * V, of_block}, column - c0, width, packed);
          pack_left<Acc>(packing, {left, a, left0, n, row - a * H, count}, scale, packed_left,
                         packed_left + n * (count + kNR<Acc>));
          add_ranks(packed_left, packed, n, {row - first, count, column - c0, of_block}, length, panel);
        };
        if (rb > 0) add(L, plan.left, b * rb, R, a * rb, rb);
        if (h > 0) add(Lg, plan.left_general, 0, Rg, 0, h);
      }
    }
  }

  // Packs a block of R as micro-panels of the strip, in which it begins with column `at`. Zeros
  // stand beside it in its first and last micro-panel.
  void pack_right(const BlockOf& from, int64_t at, int64_t width, Acc* to) const {
    if (at % kNR<Acc> == 0) {
      pack_panel<Acc>(from, to + at * from.rows);
      return;
    }
    for (int64_t i = 0; i < from.rows * round_up(width, kNR<Acc>); i++) to[i] = Acc(0);
    for_dtype<Acc>(from.param.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      const P* data = static_cast<const P*>(from.param.data) + from.offset();
      for (int64_t q = 0; q < from.rows; q++)
        for (int64_t c = 0; c < from.columns; c++)
          to[((at + c) / kNR<Acc> * from.rows + q) * kNR<Acc> + (at + c) % kNR<Acc>] =
              to_acc<Acc>(data[q * from.param.row_stride + c * from.param.column_stride]);
    });
  }

  // Some rows and columns of a panel
  struct PartOfPanel {
    int64_t row, rows, column, columns;
  };
  // Adds the product of packed factors of dW to a part of a panel that has `length` rows. n: terms
  // of its sums.
  void add_ranks(const Acc* left, const Acc* right, int64_t n, const PartOfPanel& part, int64_t length,
                 Acc* panel) const {
    for (int64_t i = part.column / kNR<Acc>; i * kNR<Acc> < part.column + part.columns; i++)
      for_row_groups(part.rows, [&](auto group, int64_t m) {
        add_to_panel<decltype(group)::value>(left + m * n, right + i * n * kNR<Acc>, n,
                                             panel + (i * length + part.row + m) * kNR<Acc>);
      });
  }

  template <int MR>
  __attribute__((noinline)) void add_to_panel(const Acc* left, const Acc* right, int64_t n, Acc* to) const {
    Vec<Acc> sum[MR][2] = {};
    multiply<Fp32<Acc>>(n, LeftPacked<Acc, MR>{left}, right, kNR<Acc>, sum, Nothing{});
    for_sums<MR, 2>([&](int m, int v) {
      Acc* at = to + m * kNR<Acc> + v * kWidth<Acc>;
      store<Acc>(at, load<Acc>(at) + sum[m][v]);
    });
  }

  // ------------------------------------------------------------------ in P

  // Multiplies some tokens by a chunk. The sums are written to out with the first chunk, and added
  // with the others.
  void multiply_chunk(const Item& item, const Source<Acc>& a, int64_t chunk, const Acc* panel, int64_t m0,
                      int64_t tokens) const {
    const int64_t length = plan.chunks.length(chunk);
    Acc* to = static_cast<Acc*>(out.data) + (item.t0 + m0) * columns + item.c0;
    const Acc* start = bias == nullptr ? nullptr : bias + item.c0;
    for_column_groups<Acc>(round_up(item.width, kWidth<Acc>), [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const Acc *b = panel + c * length, *from = start == nullptr ? nullptr : start + c;
      const int64_t count = smaller(NV * kWidth<Acc>, item.width - c);
      for_row_groups(tokens, [&](auto group, int64_t m) {
        constexpr int MR = decltype(group)::value;
        micro_tile<MR, NV>(length, a.from_row(m), b, chunk > 0, from, count, to + m * columns + c);
      });
    });
  }

  // Not inlined, since GCC would then hold part of the sums in memory.
  template <int MR, int NV>
  __attribute__((noinline)) void micro_tile(int64_t length, const Source<Acc>& a, const Acc* b, bool accumulate,
                                            const Acc* start, int64_t count, Acc* to) const {
    Vec<Acc> sum[MR][NV] = {};
    multiply<Fp32<Acc>>(length, LeftRows<const Acc, MR>(a.data, a.ld), b, kNR<Acc>, sum, Nothing{});
    const Acc* from = accumulate ? to : start;
    const int64_t ld = accumulate ? columns : 0;
    if (from != nullptr)
      for_sums<MR, NV>([&](int m, int v) {
        const int64_t c = v * kWidth<Acc>;
        sum[m][v] += load_some<Acc>(from + m * ld + c, count - c);
      });
    for_sums<MR, NV>([&](int m, int v) {
      const int64_t c = v * kWidth<Acc>;
      store_some<Acc>(to + m * columns + c, sum[m][v], count - c);
    });
  }
};

template <class Acc>
void run(const LinearParams& p, const LinearPlan& plan) {
  const int64_t T = p.shape.T, N = p.shape.N, M = p.shape.M, k = p.shape.k, r = p.shape.r, h = p.shape.h;
  const Adapter& a = p.adapter;
  const Acc* bias = static_cast<const Acc*>(p.bias);
  const Acc s = Acc(p.scaling);
  const Param At = transposed(a.A), Ag = blocks_of_columns(a.A_general, N / k);
  const Param Bgt = transposed(blocks_of_rows(a.B_general, M / k));
  const Linear<Acc> linear =
      p.transposed ? Linear<Acc>{plan, T, M, N, k, r, h, p.in, p.out, p.weight, a.B, Bgt, At, Ag, bias, s}
                   : Linear<Acc>{plan, T, N, M, k, r, h, p.in, p.out, transposed(p.weight), At, Ag, a.B, Bgt, bias, s};
  linear.run();
}

}  // namespace

void linear(const LinearParams& p, const LinearPlan& plan) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p, plan);
  }
  run<float>(p, plan);
}

}  // namespace gralora::cpu::GRALORA_ISA
