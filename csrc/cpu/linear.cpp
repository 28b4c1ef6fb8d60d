// SPDX-License-Identifier: Apache-2.0
// linear: out = in P + bias, where P = W + dW is made panel by panel while it is packed for the
// microkernel.
//
//   out[t, c] = bias[c] + sum_p in[t, p] * P[p, c]
//   P[a*H + i, b*V + c] = W[...] + s * ( sum_q L[a][i, b*rb + q] * R[b][a*rb + q, c]  +  sum_g Lg[a][i, g] * Rg[b][g, c] )
//
// H = rows/k, V = columns/k. y: in = x, P = (W + dW)^T, L = A, R = B; dx: in = g, P = W + dW,
// L = B^T, R = A^T. An adapter costs r/k multiply-adds for each weight and nothing for each token:
// there are no ranks, and base and y are not read again.
//
// An item is a strip of columns for a segment of tokens. Its part of P stays in L2; kTogether
// tokens walk along `in`, a chunk of P's rows at a time, and share each of its tiles in L1. Every
// sum is taken chunk by chunk in their order, whatever the items are.
#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc>
struct Linear {
  const LinearPlan& plan;
  int64_t T, rows, columns, k, r, h;  // P is [rows, columns]
  Activation in, out;
  Param W;
  Param L, Lg;  // [k, H, r], [k, H, h]
  Param R, Rg;  // [k, r, V], [k, h, V]
  const Acc* bias;
  Acc scale;
  void run() const {
    const int64_t strips = ceil_div(columns, plan.strip),
                  panel = plan.chunks_per_panel * plan.chunks.columns * plan.strip;
    const int64_t ranks = larger(r / k, h) * (plan.strip + plan.chunks.columns);
    Scratch scratch;
    const PerThread<Acc> buffers(scratch, plan.threads, panel + ranks + Block<Acc>::size(plan.tokens_together));
    parallel_items(strips * ceil_div(T, plan.segment), plan.threads, [&](int64_t i, int thread) {
      const int64_t c0 = i % strips * plan.strip, t0 = i / strips * plan.segment;
      Acc* own = buffers.of(thread);
      const Item item{c0,
                      smaller(plan.strip, columns - c0),
                      t0,
                      smaller(plan.segment, T - t0),
                      own,
                      own + panel,
                      Block<Acc>(own + panel + ranks, plan.tokens_together)};
      for (int64_t begin = 0; begin < plan.chunks.count; begin += plan.chunks_per_panel)
        run_chunks(item, begin, smaller(begin + plan.chunks_per_panel, plan.chunks.count));
    });
  }

 private:
  struct Item {
    int64_t c0, width, t0, count;  // its columns and tokens
    Acc *panel, *ranks;
    Block<Acc> block;
  };

  void run_chunks(const Item& item, int64_t begin, int64_t end) const {
    for (int64_t chunk = begin; chunk < end; chunk++) make_panel(item, chunk, panel_of(item, chunk - begin));
    const Mask no_mask{Dropout{}};
    for (int64_t m = 0; m < item.count; m += plan.tokens_together) {
      const int64_t tokens = smaller(plan.tokens_together, item.count - m);
      for (int64_t chunk = begin; chunk < end; chunk++) {
        const Part part{in, no_mask, rows, item.t0 + m, tokens, plan.chunks.first(chunk), plan.chunks.length(chunk)};
        const bool same_tokens = chunk + 1 < end;
        multiply_chunk(
            item, read_rows<Acc>(plan.in, part, item.block), chunk, panel_of(item, chunk - begin), m, tokens,
            Next{same_tokens ? m : m + plan.tokens_together, plan.chunks.first(same_tokens ? chunk + 1 : begin)});
      }
    }
  }

  Acc* panel_of(const Item& item, int64_t chunk) const {
    return item.panel + chunk * plan.chunks.columns * round_up(item.width, kNR<Acc>);
  }

  // ------------------------------------------------------------------ P

  // Rows of a chunk and an item's columns of P: tiles of kTile columns, padded with zeros
  void make_panel(const Item& item, int64_t chunk, Acc* panel) const {
    const int64_t first = plan.chunks.first(chunk), length = plan.chunks.length(chunk), H = rows / k, V = columns / k,
                  rb = r / k;
    const int64_t c0 = item.c0, width = item.width;
    pack_panel<Acc>({W, 0, first, length, c0, width}, panel);
    for (int64_t a = first / H; a * H < first + length; a++) {
      const int64_t row = larger(first, a * H), count = smaller(first + length, (a + 1) * H) - row;
      for (int64_t b = c0 / V; b * V < c0 + width; b++) {
        const int64_t column = larger(c0, b * V), of_block = smaller(c0 + width, (b + 1) * V) - column;
        const auto add = [&](const Param& left, int64_t left0, const Param& right, int64_t right0, int64_t n) {
          Acc* packed = item.ranks;
          Acc* copied = packed + n * round_up(width, kNR<Acc>);
          read_right(right, b, right0, n, column - b * V, of_block, column - c0, width, packed);
          add_ranks(rank_rows(left, a, row - a * H, count, left0, n, copied), packed, n, row - first, count, length,
                    column - c0, of_block, panel);
        };
        if (rb > 0) add(L, b * rb, R, a * rb, rb);
        if (h > 0) add(Lg, 0, Rg, 0, h);
      }
    }
  }

  // Rows row0.. of R[b] in the tiles of the strip whose columns at.. they are; zeros beside them
  void read_right(const Param& from, int64_t b, int64_t row0, int64_t n, int64_t column0, int64_t count, int64_t at,
                  int64_t width, Acc* to) const {
    const BlockOf block{from, b, row0, n, column0, count};
    if (at % kNR<Acc> == 0) {
      pack_panel<Acc>(block, to + at * n);
      return;
    }
    for (int64_t i = 0; i < n * round_up(width, kNR<Acc>); i++) to[i] = Acc(0);
    for_dtype<Acc>(from.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      const P* data = static_cast<const P*>(from.data) + block.offset();
      for (int64_t q = 0; q < n; q++)
        for (int64_t c = 0; c < count; c++) {
          const int64_t column = at + c;
          to[column / kNR<Acc> * n * kNR<Acc> + q * kNR<Acc> + column % kNR<Acc>] =
              to_acc<Acc>(data[q * from.row_stride + c * from.column_stride]);
        }
    });
  }

  // Rows row0 .. row0+count and ranks rank0 .. rank0+n of L[a]: as they lie, or a copy
  Source<Acc> rank_rows(const Param& from, int64_t a, int64_t row0, int64_t count, int64_t rank0, int64_t n,
                        Acc* to) const {
    constexpr int64_t W = kWidth<Acc>;
    const int64_t offset = a * from.block_stride + row0 * from.row_stride + rank0 * from.column_stride;
    if (from.dtype == DTypeOf<Acc>::value && from.column_stride == 1)
      return {static_cast<const Acc*>(from.data) + offset, from.row_stride};
    for_dtype<Acc>(from.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      const P* data = static_cast<const P*>(from.data) + offset;
      int64_t whole_rows = 0, whole_ranks = n / W * W;
      if (from.row_stride == 1)
        for (; whole_rows + W <= count; whole_rows += W)
          for (int64_t q = 0; q < whole_ranks; q += W)
            transpose_block<Acc>(data + whole_rows + q * from.column_stride, from.column_stride,
                                 to + whole_rows * n + q, n);
      for (int64_t i = 0; i < count; i++)
        for (int64_t q = i < whole_rows ? whole_ranks : 0; q < n; q++)
          to[i * n + q] = to_acc<Acc>(data[i * from.row_stride + q * from.column_stride]);
    });
    return {to, n};
  }

  // panel += s * left right, for `count` rows from `row` on of the `length` in the panel
  void add_ranks(Source<Acc> left, const Acc* right, int64_t n, int64_t row, int64_t count, int64_t length, int64_t at,
                 int64_t width, Acc* panel) const {
    for (int64_t tile = at / kNR<Acc>; tile * kNR<Acc> < at + width; tile++)
      for_row_groups(count, [&](auto mr, int64_t m) {
        constexpr int MR = decltype(mr)::value;
        add_tile<MR>(left.data + m * left.ld, left.ld, right + tile * n * kNR<Acc>, n,
                     panel + (tile * length + row + m) * kNR<Acc>);
      });
  }

  template <int MR>
  __attribute__((noinline)) void add_tile(const Acc* left, int64_t ld, const Acc* right, int64_t n, Acc* to) const {
    Vec<Acc> acc[MR][2] = {};
    multiply<Fp32<Acc>>(n, LeftRows<const Acc, MR>(left, ld), right, kNR<Acc>, acc, Nothing{});
    for_sums<MR, 2>([&](int m, int v) {
      Acc* at = to + m * kNR<Acc> + v * kWidth<Acc>;
      store<Acc>(at, load<Acc>(at) + scale * acc[m][v]);
    });
  }

  // ------------------------------------------------------------------ in P

  // The elements of `in` that are read after those of a chunk: the item's tokens from m on, columns
  // from `first` on
  struct Next {
    int64_t m, first;
  };

  void multiply_chunk(const Item& item, Source<Acc> a, int64_t chunk, const Acc* panel, int64_t m0, int64_t tokens,
                      Next next) const {
    const int64_t length = plan.chunks.length(chunk);
    Acc* to = static_cast<Acc*>(out.data) + (item.t0 + m0) * columns + item.c0;
    const Acc* start = bias == nullptr ? nullptr : bias + item.c0;
    for_column_groups<Acc>(round_up(item.width, kWidth<Acc>), [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      const Acc *b = panel + c * length, *from = start == nullptr ? nullptr : start + c;
      const int64_t count = smaller(NV * kWidth<Acc>, item.width - c);
      for_row_groups(tokens, [&](auto group, int64_t m) {
        constexpr int MR = decltype(group)::value;
        const Source<Acc> own{a.data + m * a.ld, a.ld};
        Acc* at = to + m * columns + c;
        if (c > 0) return micro_tile<MR, NV>(length, own, b, chunk > 0, from, count, at, Nothing{});
        const bool more = next.m + m + MR <= item.count;
        micro_tile<MR, NV>(length, own, b, chunk > 0, from, count, at,
                           NextRows(group, in, more ? item.t0 + next.m + m : -1, next.first, length, length));
      });
    });
  }

  // A function of its own: inlined among other code, GCC would keep part of the sums in memory.
  template <int MR, int NV, class Beside>
  __attribute__((noinline)) void micro_tile(int64_t length, const Source<Acc>& a, const Acc* b, bool accumulate,
                                            const Acc* start, int64_t count, Acc* to, const Beside& beside) const {
    Vec<Acc> acc[MR][NV] = {};
    multiply<Fp32<Acc>>(length, LeftRows<const Acc, MR>(a.data, a.ld), b, kNR<Acc>, acc, beside);
    if (count == NV * kWidth<Acc>) {
      if (accumulate) {
        for_sums<MR, NV>([&](int m, int v) { acc[m][v] += load<Acc>(to + m * columns + v * kWidth<Acc>); });
      } else if (start != nullptr) {
        for_sums<MR, NV>([&](int m, int v) { acc[m][v] += load<Acc>(start + v * kWidth<Acc>); });
      }
      for_sums<MR, 1>([&](int m, int) { store_row<Acc, Acc, NV>(to + m * columns, acc[m]); });
      return;
    }
    for_sums<MR, NV>([&](int m, int v) {  // columns end within a vector
      const int64_t c = v * kWidth<Acc>;
      const Acc* from = accumulate ? to + m * columns : start;
      if (from != nullptr) acc[m][v] += load_some<Acc>(from + c, count - c);
      store_some<Acc>(to + m * columns + c, acc[m][v], count - c);
    });
  }
};

template <class Acc>
void run(const LinearParams& p, const LinearPlan& plan) {
  const int64_t T = p.shape.T, N = p.shape.N, M = p.shape.M, k = p.shape.k, r = p.shape.r, h = p.shape.h;
  const Adapter& a = p.adapter;
  const Acc* bias = static_cast<const Acc*>(p.bias);
  const Acc s = Acc(p.scaling);
  const Param Ag = blocks_of_columns(a.A_general, N / k), Bg = blocks_of_rows(a.B_general, M / k);
  const Param At = transposed(a.A), Bt = transposed(a.B);
  const Param Agt = blocks_of_rows(transposed(a.A_general), N / k), Bgt = transposed(Bg);
  const Linear<Acc> linear =
      p.transposed
          ? Linear<Acc>{plan, T, M, N, k, r, h, p.in, p.out, p.weight, Bt, Bg, At, Ag, bias, s}
          : Linear<Acc>{plan, T, N, M, k, r, h, p.in, p.out, transposed(p.weight), a.A, Agt, a.B, Bgt, bias, s};
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
