// SPDX-License-Identifier: Apache-2.0
// merge: W[a*H + p, b*V + c] (+)= s * ( sum_q L[a][b*rb + q, p] * R[b][a*rb + q, c]  +  sum_g Lg[a][g, p] * Rg[b][g, c] )
//
// W is cut into k x k blocks [H, V]. Two orientations give the same sum: rows of W along M (L = B,
// R = A^T), or along N (L = A, R = B), whichever makes the columns of W unit stride. W is read and
// written once, in long runs along its rows; beside it there are only a part of R as a panel in L2,
// and the ranks of a range of rows. Each weight is one sum in a fixed order, rounded once.
#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc>
struct Merge {
  int64_t rows, columns, k, r, h;  // of W in this orientation
  Param W;
  Param L, Lg;  // [k, r, rows/k], [k, h, rows/k]
  Param R, Rg;  // [k, r, columns/k], [k, h, columns/k]
  Acc scale;
  bool accumulate;
  int64_t rb = r / k;

  static constexpr int64_t kRange = 48 * kMaxRows;  // rows that share a part of R, at most

  struct Panels {
    Panel<Acc> R, Rg;
  };

  template <class Y>
  void run(int threads) const {
    const int64_t H = rows / k, V = columns / k;
    const int64_t strip = round_up(smaller(V, larger(kPanelElements / (rb + h), 4 * kTile<Acc>)), kTile<Acc>);
    const int64_t strips = ceil_div(V, strip), panel = panel_size<Acc>(rb, strip) + panel_size<Acc>(h, strip);
    // Where all of R that meets a block of rows fits L2, it stays there for the ranges of this
    // block, which can be smaller then.
    const bool stays = k * strips * panel <= kPanelElements;
    int64_t range = smaller(kRange, larger(kMaxRows, ceil_div(rows, (stays ? 8 : 4) * threads)));
    range = round_up(smaller(range, H), kMaxRows);
    const int64_t uses = stays ? smaller(H, ceil_div(rows, threads)) : smaller(H, range);
    const int64_t ranges = ceil_div(H, range), places = stays ? k * strips : 1;
    Scratch scratch;
    const PerThread<Acc> buffers(scratch, threads,
                                 places * panel + (range + kTile<Acc>)*(rb + h) + panel_size<Acc>(rb + h, range));
    const PerThread<Panels> all_panels(scratch, threads, places);
    const PerThread<int64_t> packed_for(scratch, threads, 1);
    for (int thread = 0; thread < threads; thread++) *packed_for.of(thread) = -1;
    parallel_items(k * ranges, threads, [&](int64_t item, int thread) {
      const int64_t a = item / ranges, p0 = item % ranges * range, count = smaller(range, H - p0);
      Acc *own = buffers.of(thread), *left = own + places * panel;
      const bool ready = stays && *packed_for.of(thread) == a;
      *packed_for.of(thread) = a;
      for (int64_t b = 0; b < k; b++) {
        read_left(a, b, p0, count, left, left + (range + kTile<Acc>)*(rb + h));
        for (int64_t i = 0; i < strips; i++) {
          const int64_t c0 = i * strip, width = smaller(strip, V - c0), place = stays ? b * strips + i : 0;
          Panels& panels = all_panels.of(thread)[place];
          if (!ready) panels = read_right(a, b, c0, width, uses, own + place * panel, strip);
          Y* to = static_cast<Y*>(W.data) + (a * H + p0) * W.row_stride + (b * V + c0) * W.column_stride;
          for_row_groups(count, [&](auto mr, int64_t m) {
            merge_rows<decltype(mr)::value, Y>(left + m * (rb + h), panels.R, panels.Rg, width, to + m * W.row_stride);
          });
        }
      }
    });
  }

 private:
  // Columns [c0, c0 + width) of block b of R, of the ranks that meet row block a, and of Rg
  Panels read_right(int64_t a, int64_t b, int64_t c0, int64_t width, int64_t uses, Acc* scratch, int64_t strip) const {
    Panels panels{read_panel<Acc>(R, b, a * rb, rb, c0, width, uses, scratch), {}};
    if (h > 0) panels.Rg = read_panel<Acc>(Rg, b, 0, h, c0, width, uses, scratch + panel_size<Acc>(rb, strip));
    return panels;
  }

  // The ranks of rows p0 .. p0+count that meet column block b, scaled, then the general ones: group
  // by group, packed for the microkernel. `panel` is scratch.
  void read_left(int64_t a, int64_t b, int64_t p0, int64_t count, Acc* left, Acc* panel) const {
    const auto read = [&](const Param& param, int64_t rank0, int64_t ranks, int64_t start) {
      const Panel<Acc> from = read_panel<Acc>(param, a, rank0, ranks, p0, count, 0, panel);
      for_row_groups(count, [&](auto mr, int64_t m0) {
        constexpr int MR = decltype(mr)::value;
        for (int64_t m = 0, run; m < MR; m += run) {  // within a tile of the panel
          const int64_t column = (m0 + m) % kTile<Acc>;
          run = smaller(MR - m, kTile<Acc> - column);
          scale_columns(from.data + (m0 + m) / kTile<Acc> * from.tile + column, from.ld, ranks, run,
                        left + m0 * (rb + h) + start * MR + m, MR);
        }
      });
    };
    read(L, b * rb, rb, 0);
    if (h > 0) read(Lg, 0, h, rb);
  }

  void scale_columns(const Acc* from, int64_t from_ld, int64_t rows, int64_t columns, Acc* to, int64_t to_ld) const {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t c = 0; c < columns; c += kWidth<Acc>)
        store_some<Acc>(to + i * to_ld + c, scale * load_some<Acc>(from + i * from_ld + c, columns - c), columns - c);
  }

  // Some rows of W, from `to` on: a function of its own, since GCC would keep sums in memory among
  // other code
  template <int MR, class Y>
  __attribute__((noinline)) void merge_rows(const Acc* left, const Panel<Acc>& right, const Panel<Acc>& general,
                                            int64_t width, Y* to) const {
    constexpr int NV = 2;
    int64_t c = 0;
    if (W.column_stride == 1)
      for (; c + kTile<Acc> <= width; c += kTile<Acc>) {
        const TensorRows<Y, MR> weights(to + c, W.row_stride);
        if (kFetchesMore && sizeof(Y) == sizeof(Acc))  // memory bounds them
          for_accumulators<MR, NV>([&](int m, int v) { prefetch<1>(address(weights.row(m), (NV + v) * kWidth<Acc>)); });
        Vec<Acc> acc[MR][NV] = {};
        add_products<MR, NV>(left, right, general, c, acc);
        // All weights of the tile are loaded before one is stored: see Expand::store_tile.
        if (accumulate)
          for_accumulators<MR, NV>([&](int m, int v) { acc[m][v] += load<Acc>(weights.row(m) + v * kWidth<Acc>); });
        for_accumulators<MR, 1>([&](int m, int) { store_row<Acc, Y, NV>(weights.row(m), acc[m]); });
      }
    for (; c < width; c += kWidth<Acc>) {
      Vec<Acc> acc[MR][1] = {};
      add_products<MR, 1>(left, right, general, c, acc);
      for_accumulators<MR, 1>([&](int m, int) {
        add_edge<Y>(acc[m][0], to + m * W.row_stride + c * W.column_stride, smaller(kWidth<Acc>, width - c));
      });
    }
  }

  template <int MR, int NV>
  inline __attribute__((always_inline)) void add_products(const Acc* left, const Panel<Acc>& right,
                                                          const Panel<Acc>& general, int64_t c,
                                                          Vec<Acc> (&acc)[MR][NV]) const {
    multiply_packed<Singles<Acc>>(rb, left, right.at(0, c), right.ld, acc, nothing);
    if (h > 0) multiply_packed<Singles<Acc>>(h, left + rb * MR, general.at(0, c), general.ld, acc, nothing);
  }

  // At the end of a row within a vector, or where columns are apart
  template <class Y>
  __attribute__((noinline)) void add_edge(Vec<Acc> delta, Y* to, int64_t columns) const {
    if (W.column_stride == 1) {
      if (accumulate) delta += load_some<Acc>(to, columns);
      return store_some<Acc>(to, delta, columns);
    }
    for (int64_t i = 0; i < columns; i++) {
      Y& weight = to[i * W.column_stride];
      weight = from_acc<Y>(accumulate ? Acc(to_acc<Acc>(weight) + delta[i]) : delta[i]);
    }
  }
};

template <class Acc>
void run(const MergeParams& p) {
  const int64_t N = p.shape.N, M = p.shape.M, k = p.shape.k, r = p.shape.r, h = p.shape.h;
  const Adapter& adapter = p.adapter;
  const Param At = transposed(adapter.A), B = adapter.B;
  const Param Ag = blocks_of_columns(adapter.A_general, N / k);
  const Param Bgt = transposed(blocks_of_rows(adapter.B_general, M / k));
  const bool along_N = p.weight.column_stride != 1 && p.weight.row_stride == 1;
  const Merge<Acc> merge =
      along_N ? Merge<Acc>{N, M, k, r, h, transposed(p.weight), At, Ag, B, Bgt, Acc(p.scaling), p.accumulate}
              : Merge<Acc>{M, N, k, r, h, p.weight, B, Bgt, At, Ag, Acc(p.scaling), p.accumulate};
  for_dtype<Acc>(p.weight.dtype,
                 [&](auto* type) { merge.template run<std::remove_pointer_t<decltype(type)>>(p.threads); });
}

}  // namespace

void merge(const MergeParams& p) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p);
  }
  run<float>(p);
}

}  // namespace gralora::cpu::GRALORA_ISA
