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

// Where sums go in a plain merge: into weights, from `to` on
template <class Acc, class Y>
struct IntoWeights {
  Y* to;
  int64_t row_stride, column_stride;
  bool accumulate;  // false: the weights are overwritten and never read
  bool prefetches;

  static constexpr bool begins() { return true; }
  IntoWeights at(int64_t row, int64_t column) const {
    return {to + row * row_stride + column * column_stride, row_stride, column_stride, accumulate, prefetches};
  }
  // Whether whole micro-tiles are taken
  bool takes_tiles() const { return column_stride == 1; }

  template <int MR>
  inline __attribute__((always_inline)) auto rows(int64_t c) const {
    const LeftRows<Y, MR> weights(to + c, row_stride);
    if (prefetches) for_sums<MR, 2>([&](int m, int v) { prefetch<1>(address(weights.row(m), (2 + v) * kWidth<Acc>)); });
    return weights;
  }
  template <int MR>
  inline __attribute__((always_inline)) void put(const LeftRows<Y, MR>& weights, int64_t,
                                                 Vec<Acc> (&sum)[MR][2]) const {
    // All weights of the micro-tile are loaded before one is stored: see Expand::store_vectors.
    if (accumulate) for_sums<MR, 2>([&](int m, int v) { sum[m][v] += load<Acc>(weights.row(m) + v * kWidth<Acc>); });
    for_sums<MR, 1>([&](int m, int) { store_row<Acc, Y, 2>(weights.row(m), sum[m]); });
  }
  // Where a row ends within a vector, or where the elements of a row are not contiguous
  template <int MR>
  inline __attribute__((always_inline)) void put_edge(int64_t c, Vec<Acc> (&sum)[MR][1], int64_t count) const {
    for_sums<MR, 1>([&](int m, int) { add_edge(sum[m][0], to + m * row_stride + c * column_stride, count); });
  }

 private:
  __attribute__((noinline)) void add_edge(Vec<Acc> delta, Y* at, int64_t count) const {
    if (column_stride == 1) {
      if (accumulate) delta += load_some<Acc>(at, count);
      return store_some<Acc>(at, delta, count);
    }
    for (int64_t i = 0; i < count; i++) {
      Y& weight = at[i * column_stride];
      weight = from_acc<Y>(accumulate ? Acc(to_acc<Acc>(weight) + delta[i]) : delta[i]);
    }
  }
};

template <class Acc>
struct Merge {
  const MergePlan& plan;
  int64_t rows, columns, k, r, h;  // rows and columns of W in this orientation
  Param L, Lg;                     // [k, r, rows/k], [k, h, rows/k]
  Param R, Rg;                     // [k, r, columns/k], [k, h, columns/k]
  Acc scale;
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

  // Rows [first, first + count) of row block a, columns [from, until) of column block b. Their
  // sums go to `sink`, which is where the first of them goes. count is at most plan.rows.
  template <class Sink>
  void merge_block(int64_t a, int64_t b, int64_t first, int64_t count, int64_t from, int64_t until, const Sink& sink,
                   const Buffers& own) const {
    pack_left<Acc>(plan.left, {L, a, b * rb, rb, first, count}, scale, own.left, own.left_panel);
    if (h > 0) pack_left<Acc>(plan.left_general, {Lg, a, 0, h, first, count}, scale, own.left_general, own.left_panel);
    for (int64_t c0 = from; c0 < until; c0 += plan.strip) {
      const int64_t width = smaller(plan.strip, until - c0);
      const Panels panels = read_right(a, b, c0, width, own.panels);
      for_row_groups(count, [&](auto group, int64_t m) {
        if (sink.begins())
          merge_rows<decltype(group)::value>(own.left + m * rb, own.left_general + m * h, panels, width,
                                             sink.at(m, c0 - from));
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

  // A group of rows of W. Not inlined, since GCC would then hold part of the sums in memory.
  template <int MR, class Sink>
  __attribute__((noinline)) void merge_rows(const Acc* left, const Acc* general, const Panels& right, int64_t width,
                                            const Sink& sink) const {
    int64_t c = 0;
    if (sink.takes_tiles())
      for (; c + kNR<Acc> <= width; c += kNR<Acc>) {
        const auto rows = sink.template rows<MR>(c);
        Vec<Acc> sum[MR][2] = {};
        add_products(left, general, right, c, sum);
        sink.template put<MR>(rows, c, sum);
      }
    for (; c < width; c += kWidth<Acc>) {
      Vec<Acc> sum[MR][1] = {};
      add_products(left, general, right, c, sum);
      sink.template put_edge<MR>(c, sum, smaller(kWidth<Acc>, width - c));
    }
  }

  template <int MR, int NV>
  inline __attribute__((always_inline)) void add_products(const Acc* left, const Acc* general, const Panels& right,
                                                          int64_t c, Vec<Acc> (&sum)[MR][NV]) const {
    multiply<Fp32<Acc>>(rb, LeftPacked<Acc, MR>{left}, right.R.at(0, c), right.R.ld, sum, Nothing{});
    if (h > 0) multiply<Fp32<Acc>>(h, LeftPacked<Acc, MR>{general}, right.Rg.at(0, c), right.Rg.ld, sum, Nothing{});
  }
};

// dW of an adapter in the orientation of the plan
template <class Acc>
Merge<Acc> merge_of(const Shape& s, const Adapter& adapter, double scaling, const MergePlan& plan) {
  const Param At = transposed(adapter.A), B = adapter.B;
  const Param Ag = blocks_of_columns(adapter.A_general, s.N / s.k);
  const Param Bgt = transposed(blocks_of_rows(adapter.B_general, s.M / s.k));
  const Acc scale = Acc(scaling);
  return plan.along_N ? Merge<Acc>{plan, s.N, s.M, s.k, s.r, s.h, At, Ag, B, Bgt, scale}
                      : Merge<Acc>{plan, s.M, s.N, s.k, s.r, s.h, B, Bgt, At, Ag, scale};
}

}  // namespace gralora::cpu::GRALORA_ISA
