// SPDX-License-Identifier: Apache-2.0
// expand: from a latent activation to a wide one, added to base where there is one.
//
//   y[t, j*w + o] = base[t, j*w + o]
//       + d * scale * ( sum_c u[t, j*r + c] * Q[j][c, o]  +  sum_c u[t, k*r + c] * G[j][c, o] )
//
// In forward, U with B and Bg^T gives y; scale is the adapter's scaling, and d is 1. In backward,
// dH with A^T and Ag gives dx; d * scale is the dropout factor of the element: d is 1 where it was
// kept and 0 where it was dropped, and scale is 1/(1-p). w = width/k.
//
// base is read once and y is written once, along contiguous columns; they may be the same memory.
// The panel of a strip of columns stays in L1 or L2 for all tokens of a segment. Each element of y
// is one sum in a fixed order, rounded once.
#pragma once

#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Product>
struct Expand {
  using Acc = typename Product::Acc;

  const Shape& s;
  int64_t width;
  Param Q, G;  // [k, r, w] and [k, h, w]
  Packing packing, general_packing;
  Acc scale;
  Mask mask;
  Activation base;  // data == nullptr: there is none
  const Activation& y;

  struct Panels {
    Panel<Acc> Q, G;
  };
  int64_t panels_size(int64_t columns) const {
    return Product::panel_size(Q.dtype, s.r, columns) + Product::panel_size(G.dtype, s.h, columns);
  }
  // The panels of columns [first, first + columns) of block j
  Panels read_panels(int64_t j, int64_t first, int64_t columns, Acc* scratch) const {
    constexpr int kPieces = 2;  // a third one would be lost when y is rounded
    Panels panels{Product::read_panel(packing, {Q, j, 0, s.r, first, columns}, kPieces, scratch), {}};
    if (s.h > 0)
      panels.G = Product::read_panel(general_packing, {G, j, 0, s.h, first, columns}, kPieces,
                                     scratch + Product::panel_size(Q.dtype, s.r, columns));
    return panels;
  }

  // Columns [first, first + columns) of block j
  struct Strip {
    const Panels& panels;
    int64_t j, first, columns;
  };

  // Computes a strip for a group of tokens from t on, with their latents. mask_bits: which
  // elements were kept, where dropout is on; next: the first token of the next group, for software
  // prefetch, or -1.
  template <class Y, class Group>
  void run_rows(Group group, const Strip& strip, int64_t t, const Latents<Acc>& latents, const uint8_t* mask_bits,
                int64_t next) const {
    const int64_t start = strip.j * (width / s.k) + strip.first;
    Target<Y, Group::value> target;
    target.mask_bits = mask_bits, target.columns = strip.columns;
    for (int m = 0; m < group.count(); m++) {
      target.to[m] = static_cast<Y*>(y.data) + row_offset(y, t + m) + start * y.column_stride;
      if (base.data != nullptr)
        target.from[m] = static_cast<const Y*>(base.data) + row_offset(base, t + m) + start * base.column_stride;
    }
    const Activation& read = base.data != nullptr ? base : y;
    for_column_groups<Acc>(strip.columns, [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      micro_tile(group, nv, strip.panels, latents, target, c,
                 NextRows(group, read, next, start + c, NV * kWidth<Acc>, Product::steps(s.r)));
    });
  }

 private:
  // The rows where a micro-tile is stored, and the rows of base that are added to it
  template <class Y, int MR>
  struct Target {
    const Y* from[MR] = {};
    Y* to[MR];
    const uint8_t* mask_bits;
    int64_t columns;
  };

  // Not inlined, since GCC would then hold part of the sums in memory.
  template <class Y, class Group, int NV>
  __attribute__((noinline)) void micro_tile(Group group, Int<NV>, const Panels& panels, const Latents<Acc>& latents,
                                            const Target<Y, Group::value>& target, int64_t c,
                                            const NextRows<Group>& next) const {
    typename Product::template Sums<Group, NV> sums(group);
    sums.add(Product::steps(s.r), Product::left(group, latents.block), panels.Q.from(0, c), next);
    if (s.h > 0) sums.add(Product::steps(s.h), Product::left(group, latents.general), panels.G.from(0, c), Nothing{});
    sums.for_rows([&](auto& sum, int m) __attribute__((always_inline)) { store_rows(sum, target, m, c); });
  }

  // The epilogue for rows m0 .. of the group, from column c on
  template <class Y, int most, int MR, int NV>
  inline __attribute__((always_inline)) void store_rows(Vec<Acc> (&sum)[MR][NV], const Target<Y, most>& target, int m0,
                                                        int64_t c) const {
    const bool unit = y.column_stride == 1 && (base.data == nullptr || base.column_stride == 1);
    if (unit && c + NV * kWidth<Acc> <= target.columns) return store_vectors<true>(sum, target, m0, c);
    if (unit) return store_vectors<false>(sum, target, m0, c);
    for_sums<MR, NV>([&](int m, int v) {
      const int64_t o = c + v * kWidth<Acc>;
      store_elements<Y>(sum[m][v], target.from[m0 + m], target.to[m0 + m], o, smaller(kWidth<Acc>, target.columns - o),
                        target.mask_bits + (m0 + m) * kMaskRow);
    });
  }

  // The epilogue where columns are contiguous. whole: the strip does not end within the
  // micro-tile. All of base is loaded before any of y is stored: where rows are a multiple of 4096
  // bytes apart, a load would otherwise wait for the store before it. Each condition has a loop of
  // its own, since within one loop GCC would test it for each vector, and hold the sums in memory.
  template <bool whole, class Y, int most, int MR, int NV>
  inline __attribute__((always_inline)) void store_vectors(Vec<Acc> (&sum)[MR][NV], const Target<Y, most>& target,
                                                           int m0, int64_t c) const {
    if (mask.on)
      for_sums<MR, NV>([&](int m, int v) {
        sum[m][v] = Mask::drop<Acc>(sum[m][v], target.mask_bits + (m0 + m) * kMaskRow, c + v * kWidth<Acc>);
      });
    if (base.data == nullptr)
      for_sums<MR, NV>([&](int m, int v) { sum[m][v] *= scale; });
    else
      for_sums<MR, NV>([&](int m, int v) {
        const int64_t o = c + v * kWidth<Acc>;
        const Y* from = target.from[m0 + m] + o;
        sum[m][v] = multiply_add(sum[m][v], scale, whole ? load<Acc>(from) : load_some<Acc>(from, target.columns - o));
      });
    if constexpr (whole)
      for_sums<MR, 1>([&](int m, int) { store_row<Acc, Y, NV>(target.to[m0 + m] + c, sum[m]); });
    else
      for_sums<MR, NV>([&](int m, int v) {
        const int64_t o = c + v * kWidth<Acc>;
        store_some<Acc>(target.to[m0 + m] + o, sum[m][v], target.columns - o);
      });
  }

  // The epilogue where columns are not contiguous: one vector of sums, element by element
  template <class Y>
  __attribute__((noinline)) void store_elements(Vec<Acc> sum, const Y* from, Y* to, int64_t o, int64_t count,
                                                const uint8_t* mask_bits) const {
    for (int64_t i = 0; i < count; i++) {
      Acc value = scale * sum[i];
      if (mask.on) value = Mask::drop<Acc>(value, mask_bits, o + i);
      if (from != nullptr) value += to_acc<Acc>(from[(o + i) * base.column_stride]);
      to[(o + i) * y.column_stride] = from_acc<Y>(value);
    }
  }
};

// From U to y
template <class Product>
Expand<Product> expand_y(const ForwardParams& p, const ForwardPlan& plan) {
  const Shape& s = p.shape;
  const Param G = transposed(blocks_of_rows(p.adapter.B_general, s.M / s.k));
  return {s,      s.M, p.adapter.B, G, plan.B, plan.B_general, typename Product::Acc(p.scaling), Mask(Dropout{}),
          p.base, p.y};
}

// From dH to dx
template <class Product>
Expand<Product> expand_x(const BackwardParams& p, const BackwardPlan& plan) {
  const Shape& s = p.shape;
  const Mask mask(p.dropout);
  const Param G = blocks_of_columns(p.adapter.A_general, s.N / s.k);
  const Activation added = p.add_to_grad_x ? p.grad_x : Activation{};
  return {
      s,     s.N,     transposed(p.adapter.A), G, plan.A, plan.A_general, typename Product::Acc(mask.keep_scale), mask,
      added, p.grad_x};
}

}  // namespace gralora::cpu::GRALORA_ISA
