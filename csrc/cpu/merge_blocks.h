// SPDX-License-Identifier: Apache-2.0
// The products of a merge, added to W or written:
//
//   W[a*H + p, b*V + c] (+)=
//       s * ( sum_q L[a][b*rb + q, p] * R[b][a*rb + q, c]  +  sum_g Lg[a][g, p] * Rg[b][g, c] )
//
// W is cut into k x k blocks [H, V]. It can be taken in two orientations that give the same sums:
// with rows along M (L = B, R = A^T), or along N, as its transpose (L = A^T, R = B). The plan
// takes the one in which rows are contiguous. The only other memory is a panel of R in L2, and the
// left micro-panels of a range of rows. Each weight is one sum in a fixed order, rounded once,
// whatever part of a block it is computed with.
#pragma once

#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {

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

  // Elements of the scratch of one thread
  int64_t buffers_size() const {
    return panel_size<Acc>(rb + h, plan.strip) + left_size() + (plan.rows + kNR<Acc>)*h +
           panel_size<Acc>(larger(rb, h), plan.rows);
  }
  Buffers buffers(Acc* own) const {
    Acc *left = own + panel_size<Acc>(rb + h, plan.strip), *general = left + left_size();
    return {own, left, general, general + (plan.rows + kNR<Acc>)*h};
  }

  // Rows [first, first + count) of row block a, columns [from, until) of column block b; `to` is
  // where the first of them is written. count is at most plan.rows.
  template <class Y>
  void merge_block(int64_t a, int64_t b, int64_t first, int64_t count, int64_t from, int64_t until, Y* to,
                   const Buffers& own) const {
    pack_left<Acc>(plan.left, {L, a, b * rb, rb, first, count}, scale, own.left, own.left_panel);
    if (h > 0) pack_left<Acc>(plan.left_general, {Lg, a, 0, h, first, count}, scale, own.left_general, own.left_panel);
    for (int64_t c0 = from; c0 < until; c0 += plan.strip) {
      const int64_t width = smaller(plan.strip, until - c0);
      const Panels panels = read_right(a, b, c0, width, own.panels);
      for_row_groups(count, [&](auto group, int64_t m) {
        merge_rows<decltype(group)::value, Y>(own.left + m * rb, own.left_general + m * h, panels, width,
                                              to + m * W.row_stride + (c0 - from) * W.column_stride);
      });
    }
  }

 private:
  int64_t left_size() const { return (plan.rows + kNR<Acc>)*rb; }

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

// The merge of an adapter into `weight`, [M, N] by its strides
template <class Acc>
Merge<Acc> merge_of(const Shape& s, const Adapter& adapter, double scaling, const MergePlan& plan, const Param& weight,
                    bool accumulate) {
  const Param At = transposed(adapter.A), B = adapter.B;
  const Param Ag = blocks_of_columns(adapter.A_general, s.N / s.k);
  const Param Bgt = transposed(blocks_of_rows(adapter.B_general, s.M / s.k));
  const Acc scale = Acc(scaling);
  return plan.along_N ? Merge<Acc>{plan, s.N, s.M, s.k, s.r, s.h, transposed(weight), At, Ag, B, Bgt, scale, accumulate}
                      : Merge<Acc>{plan, s.M, s.N, s.k, s.r, s.h, weight, B, Bgt, At, Ag, scale, accumulate};
}

}  // namespace gralora::cpu::GRALORA_ISA
