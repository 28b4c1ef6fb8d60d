// merge: W[a*H + p, b*V + c] (+)= s * ( sum_q L[a][b*rb + q, p] * R[b][a*rb + q, c]  +  sum_g Lg[a][g, p] * Rg[b][g, c] )
//
// W is cut into k x k blocks [H, V]. Two orientations give the same sum: rows of W along M (L = B, R = A^T), or along N
// (L = A, R = B), whichever makes the columns of W unit stride. W is read and written once, in long runs along its rows;
// beside it there are only a part of R as a panel in L2, and the ranks of a range of rows. Each weight is one sum in a fixed
// order, rounded once.
#include "capability.h"
#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

// Whether float weights are fetched a tile ahead: memory bounds them, and AMD's processors have enough lines under way for it.
static const bool kFetchesAhead = strcmp(vendor(), "amd") == 0;

template <class Acc>
struct Merge {
  int64_t rows, columns, k, r, h;  // of W in this orientation
  Param W;
  Param L, Lg;  // [k, r, rows/k], [k, h, rows/k]
  Param R, Rg;  // [k, r, columns/k], [k, h, columns/k]
  Acc scale;
  bool accumulate;

  static constexpr int64_t kRange = 48 * kMaxRows;  // rows that share a part of R, at most

  template <class Y>
  void run(int threads) const {
    const int64_t H = rows / k, V = columns / k, rb = r / k;
    int64_t range = smaller(kRange, larger(kMaxRows, ceil_div(rows, 4 * threads)));
    range = round_up(smaller(range, H), kMaxRows);
    const int64_t strip = round_up(smaller(V, larger(kPanelElements / (rb + h), 4 * kTile<Acc>)), kTile<Acc>);
    const int64_t panel = panel_size<Acc>(rb, strip) + panel_size<Acc>(h, strip), ranges = ceil_div(H, range);
    Scratch scratch;
    const PerThread<Acc> buffers(scratch, threads,
                                 panel + (range + kTile<Acc>)*(rb + h) + panel_size<Acc>(rb + h, range));
    parallel_items(k * ranges, threads, [&](int64_t item, int thread) {
      const int64_t a = item / ranges, p0 = item % ranges * range, count = smaller(range, H - p0);
      Acc* left = buffers.of(thread) + panel;
      for (int64_t b = 0; b < k; b++) {
        read_left(a, b, p0, count, left, left + (range + kTile<Acc>)*(rb + h));
        for (int64_t c0 = 0; c0 < V; c0 += strip) {
          const int64_t width = smaller(strip, V - c0);
          const Panel<Acc> right = read_panel<Acc>(R, b, a * rb, rb, c0, width, count, buffers.of(thread));
          Panel<Acc> general;
          if (h > 0)
            general = read_panel<Acc>(Rg, b, 0, h, c0, width, count, buffers.of(thread) + panel_size<Acc>(rb, strip));
          Y* to = static_cast<Y*>(W.data) + (a * H + p0) * W.row_stride + (b * V + c0) * W.column_stride;
          for_row_groups(count, [&](auto mr, int64_t m) {
            merge_rows<decltype(mr)::value, Y>(left + m * (rb + h), right, general, width, to + m * W.row_stride);
          });
        }
      }
    });
  }

 private:
  // The ranks of rows p0 .. p0+count that meet column block b, scaled, then the general ones: group by group, packed
  // for the microkernel.
  void read_left(int64_t a, int64_t b, int64_t p0, int64_t count, Acc* left, Acc* panel) const {
    const int64_t rb = r / k;
    const auto read = [&](const Param& param, int64_t rank0, int64_t ranks, int64_t start) {
      const Panel<Acc> from = read_panel<Acc>(param, a, rank0, ranks, p0, count, 0, panel);
      for_row_groups(count, [&](auto mr, int64_t m0) {
        constexpr int MR = decltype(mr)::value;
        Acc* to = left + m0 * (rb + h) + start * MR;
        for (int m = 0; m < MR; m++) {
          const int64_t p = m0 + m;
          const Acc* column = from.data + p / kTile<Acc> * from.tile + p % kTile<Acc>;
          for (int64_t c = 0; c < ranks; c++) to[c * MR + m] = scale * column[c * from.ld];
        }
      });
    };
    read(L, b * rb, rb, 0);
    if (h > 0) read(Lg, 0, h, rb);
  }

  template <int MR, class Y>
  void merge_rows(const Acc* left, const Panel<Acc>& right, const Panel<Acc>& general, int64_t width, Y* to) const {
    const int64_t rb = r / k;
    for_column_tiles<Acc>(round_up(width, kWidth<Acc>), [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      Vec<Acc> acc[MR][NV] = {};
      if (kFetchesAhead && sizeof(Y) == sizeof(Acc))
        for_accumulators<MR, NV>(
            [&](int m, int v) { __builtin_prefetch(to + m * W.row_stride + c + (NV + v) * kWidth<Acc>, 1); });
      multiply_packed<Singles<Acc>>(rb, left, right.at(0, c), right.ld, acc, nothing);
      if (h > 0) multiply_packed<Singles<Acc>>(h, left + rb * MR, general.at(0, c), general.ld, acc, nothing);
      if (W.column_stride == 1 && c + NV * kWidth<Acc> <= width) {
        // All weights of the tile are loaded before one is stored: see Expand::store_tile.
        if (accumulate)
          for_accumulators<MR, NV>(
              [&](int m, int v) { acc[m][v] += load<Acc>(to + m * W.row_stride + c + v * kWidth<Acc>); });
        for_accumulators<MR, 1>([&](int m, int) { store_row<Acc, Y, NV>(to + m * W.row_stride + c, acc[m]); });
        return;
      }
      if (W.column_stride == 1) {  // columns end within a vector
        for_accumulators<MR, NV>([&](int m, int v) {
          Y* at = to + m * W.row_stride + c + v * kWidth<Acc>;
          const int64_t left = width - c - v * kWidth<Acc>;
          if (accumulate) acc[m][v] += load_some<Acc>(at, left);
          store_some<Acc>(at, acc[m][v], left);
        });
        return;
      }
      for_accumulators<MR, NV>(
          [&](int m, int v) { add_elements<Y>(acc[m][v], to + m * W.row_stride, c + v * kWidth<Acc>, width); });
    });
  }

  template <class Y>
  __attribute__((noinline)) void add_elements(Vec<Acc> delta, Y* row, int64_t c, int64_t width) const {
    for (int64_t i = 0; i < smaller(kWidth<Acc>, width - c); i++) {
      Y& weight = row[(c + i) * W.column_stride];
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
