// SPDX-License-Identifier: Apache-2.0
// merge:
//
//   W[a*H + p, b*V + c] (+)=
//       s * ( sum_q L[a][b*rb + q, p] * R[b][a*rb + q, c]  +  sum_g Lg[a][g, p] * Rg[b][g, c] )
//
// W is cut into k x k blocks [H, V]. It can be taken in two orientations that give the same sums:
// with rows along M (L = B, R = A^T), or along N, as its transpose (L = A^T, R = B). The plan
// takes the one in which rows are contiguous. W is read and written once, along its rows. The only
// other memory is a panel of R in L2, and the left micro-panels of a range of rows. Each weight is
// one sum in a fixed order, rounded once.
#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc>
struct Merge {
  const MergePlan& plan;
  int64_t rows, columns, k, r, h;  // rows and columns of W in this orientation
  Param W;
  Param L, Lg;  // [k, r, rows/k], [k, h, rows/k]
  Param R, Rg;  // [k, r, columns/k], [k, h, columns/k]
  Acc scale;
  bool accumulate;  // false: W is overwritten and never read
  const int64_t rb = r / k, H = rows / k, V = columns / k;

  struct Panels {
    Panel<Acc> R, Rg;
  };
  // The scratch of one thread
  struct Buffers {
    Acc *panels, *left, *left_general, *left_panel;
  };

  template <class Y>
  void run() const {
    const int64_t ranges = ceil_div(H, plan.rows), left_size = (plan.rows + kNR<Acc>)*rb;
    const int64_t general_size = (plan.rows + kNR<Acc>)*h;
    Scratch scratch;
    const PerThread<Acc> buffers(
        scratch, plan.threads,
        panel_size<Acc>(rb + h, plan.strip) + left_size + general_size + panel_size<Acc>(larger(rb, h), plan.rows));
    parallel_items(k * ranges, plan.threads, [&](int64_t item, int thread) {
      Acc *own = buffers.of(thread), *left = own + panel_size<Acc>(rb + h, plan.strip);
      const int64_t first = item % ranges * plan.rows, count = smaller(plan.rows, H - first);
      merge_range<Y>(item / ranges, first, count, {own, left, left + left_size, left + left_size + general_size});
    });
  }

 private:
  // Rows [first, first + count) of row block a
  template <class Y>
  void merge_range(int64_t a, int64_t first, int64_t count, const Buffers& own) const {
    for (int64_t b = 0; b < k; b++) {
      pack_left<Acc>(plan.left, {L, a, b * rb, rb, first, count}, scale, own.left, own.left_panel);
      if (h > 0)
        pack_left<Acc>(plan.left_general, {Lg, a, 0, h, first, count}, scale, own.left_general, own.left_panel);
      for (int64_t c0 = 0; c0 < V; c0 += plan.strip) {
        const int64_t width = smaller(plan.strip, V - c0);
        const Panels panels = read_right(a, b, c0, width, own.panels);
        Y* to = static_cast<Y*>(W.data) + (a * H + first) * W.row_stride + (b * V + c0) * W.column_stride;
        for_row_groups(count, [&](auto group, int64_t m) {
          merge_rows<decltype(group)::value, Y>(own.left + m * rb, own.left_general + m * h, panels, width,
                                                to + m * W.row_stride);
        });
      }
    }
  }

  // Columns [c0, c0 + width) of block b of R, for the ranks that belong to row block a, and of Rg
  Panels read_right(int64_t a, int64_t b, int64_t c0, int64_t width, Acc* scratch) const {
    Panels panels{read_panel<Acc>(plan.right, {R, b, a * rb, rb, c0, width}, scratch), {}};
    if (h > 0)
      panels.Rg =
          read_panel<Acc>(plan.right_general, {Rg, b, 0, h, c0, width}, scratch + panel_size<Acc>(rb, plan.strip));
    return panels;
  }

  // A group of rows of W, from `to` on. Not inlined, since GCC would then hold part of the sums in
  // memory.
  template <int MR, class Y>
  __attribute__((noinline)) void merge_rows(const Acc* left, const Acc* general, const Panels& right, int64_t width,
                                            Y* to) const {
    constexpr int NV = 2;
    int64_t c = 0;
    if (W.column_stride == 1)
      for (; c + kNR<Acc> <= width; c += kNR<Acc>) {
        const LeftRows<Y, MR> weights(to + c, W.row_stride);
        if (plan.prefetches)
          for_sums<MR, NV>([&](int m, int v) { prefetch<1>(address(weights.row(m), (NV + v) * kWidth<Acc>)); });
        Vec<Acc> sum[MR][NV] = {};
        add_products(left, general, right, c, sum);
        // All weights of the micro-tile are loaded before one is stored: see
        // Expand::store_vectors.
        if (accumulate)
          for_sums<MR, NV>([&](int m, int v) { sum[m][v] += load<Acc>(weights.row(m) + v * kWidth<Acc>); });
        for_sums<MR, 1>([&](int m, int) { store_row<Acc, Y, NV>(weights.row(m), sum[m]); });
      }
    for (; c < width; c += kWidth<Acc>) {
      Vec<Acc> sum[MR][1] = {};
      add_products(left, general, right, c, sum);
      for_sums<MR, 1>([&](int m, int) {
        add_edge<Y>(sum[m][0], to + m * W.row_stride + c * W.column_stride, smaller(kWidth<Acc>, width - c));
      });
    }
  }

  template <int MR, int NV>
  inline __attribute__((always_inline)) void add_products(const Acc* left, const Acc* general, const Panels& right,
                                                          int64_t c, Vec<Acc> (&sum)[MR][NV]) const {
    multiply<Fp32<Acc>>(rb, LeftPacked<Acc, MR>{left}, right.R.at(0, c), right.R.ld, sum, Nothing{});
    if (h > 0) multiply<Fp32<Acc>>(h, LeftPacked<Acc, MR>{general}, right.Rg.at(0, c), right.Rg.ld, sum, Nothing{});
  }

  // The epilogue where a row ends within a vector, or where the elements of a row are not
  // contiguous
  template <class Y>
  __attribute__((noinline)) void add_edge(Vec<Acc> delta, Y* to, int64_t count) const {
    if (W.column_stride == 1) {
      if (accumulate) delta += load_some<Acc>(to, count);
      return store_some<Acc>(to, delta, count);
    }
    for (int64_t i = 0; i < count; i++) {
      Y& weight = to[i * W.column_stride];
      weight = from_acc<Y>(accumulate ? Acc(to_acc<Acc>(weight) + delta[i]) : delta[i]);
    }
  }
};

template <class Acc>
void run(const MergeParams& p, const MergePlan& plan) {
  const int64_t N = p.shape.N, M = p.shape.M, k = p.shape.k, r = p.shape.r, h = p.shape.h;
  const Adapter& adapter = p.adapter;
  const Param At = transposed(adapter.A), B = adapter.B;
  const Param Ag = blocks_of_columns(adapter.A_general, N / k);
  const Param Bgt = transposed(blocks_of_rows(adapter.B_general, M / k));
  const Acc scale = Acc(p.scaling);
  const Merge<Acc> merge =
      plan.along_N ? Merge<Acc>{plan, N, M, k, r, h, transposed(p.weight), At, Ag, B, Bgt, scale, p.accumulate}
                   : Merge<Acc>{plan, M, N, k, r, h, p.weight, B, Bgt, At, Ag, scale, p.accumulate};
  for_dtype<Acc>(p.weight.dtype, [&](auto* type) { merge.template run<std::remove_pointer_t<decltype(type)>>(); });
}

}  // namespace

void merge(const MergeParams& p, const MergePlan& plan) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p, plan);
  }
  run<float>(p, plan);
}

}  // namespace gralora::cpu::GRALORA_ISA
