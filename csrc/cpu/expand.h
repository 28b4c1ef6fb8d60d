// SPDX-License-Identifier: Apache-2.0
// expand: from the ranks to a wide activation, added to base where there is one.
//
//   y[t, j*w + o] = base[t, j*w + o] + f * s * ( sum_c u[t, j*r + c] * Q[j][c, o]  +  sum_c u[t, k*r + c] * G[j][c, o] )
//
// w = width/k; f is the dropout factor of the element (1 where dropout is off). Forward: U, B, Bg^T
// give y. Backward: dH, A^T, Ag give dx. base is read once, y written once (they may be the same
// memory), in runs along the row; a strip of Q's columns stays in L1 or L2 for all tokens of a
// segment. Each y is one sum in a fixed order, rounded once.
#pragma once

#include "pieces.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc, class Product>
struct Expand {
  static constexpr int kTerms = Product::kTerms;

  int64_t width, k, r, h;
  Param Q;    // [k, r, w]
  Param G;    // [k, h, w]
  Acc scale;  // of what is added to base; with that of the mask
  Mask mask;
  Rows base;  // data == nullptr: none
  Rows y;

  struct Panels {
    Panel<Acc> Q, G;
  };
  int64_t panels_size(int64_t columns) const {
    return panel_size_for<Product, Acc>(Q.dtype, r, columns) + panel_size_for<Product, Acc>(G.dtype, h, columns);
  }
  // By tiles: of U and B, as many as y's rounding leaves to be seen
  static constexpr int kPieces = 2;
  // `columns` from `first` on within block j
  Panels read_panels(int64_t j, int64_t first, int64_t columns, int64_t uses, Acc* scratch) const {
    Panels panels{read_panel_for<Product>(Q, j, 0, r, first, columns, uses, kPieces, scratch), {}};
    if (h > 0)
      panels.G = read_panel_for<Product>(G, j, 0, h, first, columns, uses, kPieces,
                                         scratch + panel_size_for<Product, Acc>(Q.dtype, r, columns));
    return panels;
  }

  // Of the panels of columns of block j, while as many tokens meet as many columns; general parts
  // are small.
  Ahead ahead(int64_t j, int64_t first, int64_t columns, int64_t tokens) const {
    const int64_t groups = ceil_div(tokens, Product::kRows), tiles = ceil_div(columns, kTile<Acc>);
    return Ahead::of(Q, j, 0, r, first, columns, groups * tiles * ceil_div(r / kTerms, kSteps));
  }

  // Whether products can be of pairs: of ranks that are rounded, for y of bf16
  bool takes_pairs() const { return has_pairs(Q, r) && (h == 0 || has_pairs(G, h)); }

  // Some tokens from t0 on, whose ranks are `ranks`; kept: which of their elements are, where there
  // is a mask. each(p) is called for every kSteps steps of each tile.
  template <class Y, class Tokens, class Each>
  void run_rows(Tokens tokens, const Panels& panels, int64_t t0, int64_t j, int64_t first, int64_t columns,
                const Ranks<Acc>& ranks, const uint8_t* kept, Prefetch prefetch, Each&& each) const {
    constexpr int MR = Tokens::value;
    const int64_t start = j * (width / k) + first;
    RowGroup<MR, Y> group{panels,
                          ranks.at(j * ranks.block),
                          ranks.at(ranks.general),
                          ranks.steps,
                          ranks.general_steps,
                          {},
                          {},
                          kept,
                          prefetch,
                          columns};
    for (int m = 0; m < tokens.count(); m++) {
      group.to[m] = static_cast<Y*>(y.data) + row_offset(y, t0 + m) + start * y.column_stride;
      group.from[m] = base.data == nullptr
                          ? nullptr
                          : static_cast<const Y*>(base.data) + row_offset(base, t0 + m) + start * base.column_stride;
    }
    // Ranks in one set of L1 would come from L2 for each of their products.
    alignas(64) Acc near[kByTiles<Product> ? 1 : MR * kRow<Acc>];
    if (!kByTiles<Product> && in_one_set(group.ranks.ld * int64_t(sizeof(Acc))) && ranks.steps <= kChunk) {
      for (int m = 0; m < tokens.count(); m++)
        convert_row<Acc>(group.ranks.data + m * group.ranks.ld, 1, ranks.steps, near + m * kRow<Acc>);
      group.ranks = {near, kRow<Acc>};
    }
    for_column_tiles<Acc>(round_up(columns, kWidth<Acc>),
                          [&](auto nv, int64_t c) { tile<Y>(tokens, nv, group, c, each); });
  }

 private:
  // Where rows of sums go, and what is added to them
  template <class Y>
  struct Target {
    const Y* const* from;
    Y* const* to;
    const uint8_t* kept;
    int64_t columns;
    Target rows(int m) const { return {from + m, to + m, kept == nullptr ? nullptr : kept + m * kKept, columns}; }
  };

  template <int MR, class Y>
  struct RowGroup {
    const Panels& panels;
    Source<Acc> ranks, general_ranks;
    int64_t steps, general_steps;
    const Y* from[MR];
    Y* to[MR];
    const uint8_t* kept;
    Prefetch prefetch;
    int64_t columns;
    Target<Y> target() const { return {from, to, kept, columns}; }
  };

  // each(p), and columns c.. of what comes next are fetched, `columns` of them
  template <class Tokens, class Each>
  static auto beside(Tokens tokens, const Prefetch& prefetch, int64_t c, int64_t columns, int64_t steps, Each&& each) {
    RowsAhead first(tokens, prefetch, c), second(tokens, prefetch, c + kSteps);
    const bool both = steps <= kSteps && kSteps < columns;
    return [=, &each](int64_t p, int part) mutable {
      if (p < columns) first.fetch(part);
      if (both) second.fetch(part);
      if (part == 0) each(p);
    };
  }

  // A function of its own: inlined among other code, GCC would keep part of the accumulators in
  // memory.
  template <class Y, int MR, int NV, class Each>
  __attribute__((noinline)) void tile(Int<MR> tokens, Int<NV>, const RowGroup<MR, Y>& g, int64_t c, Each&& each) const {
    const Panel<Acc>&Q = g.panels.Q, &G = g.panels.G;
    Vec<Acc> acc[MR][NV] = {};
    multiply_rows<Product>(g.steps, g.ranks.data, g.ranks.ld, Q.at(0, c), Q.ld, acc,
                           beside(tokens, g.prefetch, c, NV * kWidth<Acc>, g.steps, each));
    if (h > 0)
      multiply_rows<Product>(g.general_steps, g.general_ranks.data, g.general_ranks.ld, G.at(0, c), G.ld, acc, nothing);
    store_rows<MR, NV, Y>(acc, g.target(), c);
  }
  template <class Y, int MR, bool all, int NV, class Each>
  __attribute__((noinline)) void tile(UpTo<MR, all> tokens, Int<NV>, const RowGroup<MR, Y>& g, int64_t c,
                                      Each&& each) const {
    constexpr int64_t columns = NV * kWidth<Acc>;
    alignas(64) Acc stored[MR][kTile<Acc>];
    {
      typename Product::Sums sums(tokens.count(), columns);
      sums.add(g.steps, g.ranks, g.panels.Q.from(0, c), beside(tokens, g.prefetch, c, columns, g.steps, each));
      if (h > 0) sums.add(g.general_steps, g.general_ranks, g.panels.G.from(0, c), nothing);
      sums.store(stored[0], kTile<Acc>);
    }
    const auto store_group = [&](auto group, int m0) {
      constexpr int rows = decltype(group)::value;
      Vec<Acc> acc[rows][NV];
      for_accumulators<rows, NV>([&](int m, int v) { acc[m][v] = load<Acc>(stored[m0 + m] + v * kWidth<Acc>); });
      store_rows<rows, NV, Y>(acc, g.target().rows(m0), c);
    };
    int m = 0;
    for (; m + 8 <= tokens.count(); m += 8) store_group(Int<8>{}, m);
    for (; m < tokens.count(); m++) store_group(Int<1>{}, m);
  }

  template <int MR, int NV, class Y>
  inline __attribute__((always_inline)) void store_rows(Vec<Acc> (&sum)[MR][NV], const Target<Y>& g, int64_t c) const {
    const bool unit = y.column_stride == 1 && (base.data == nullptr || base.column_stride == 1);
    if (unit && c + NV * kWidth<Acc> <= g.columns) return store_tile<true, MR, NV, Y>(sum, g, c);
    if (unit) return store_tile<false, MR, NV, Y>(sum, g, c);
    for_accumulators<MR, NV>([&](int m, int v) {
      const int64_t o = c + v * kWidth<Acc>;
      store_elements<Y>(sum[m][v], g.from[m], g.to[m], o, smaller(kWidth<Acc>, g.columns - o), g.rows(m).kept);
    });
  }

  // All of base is loaded before y is stored: rows that lie 4096 bytes apart would make each load
  // wait for a store. whole: no column ends within the tile. A loop for each condition: within one
  // loop GCC would test it for each vector, and keep sums in memory.
  template <bool whole, int MR, int NV, class Y>
  inline __attribute__((always_inline)) void store_tile(Vec<Acc> (&sum)[MR][NV], const Target<Y>& g, int64_t c) const {
    if (mask.on)
      for_accumulators<MR, NV>(
          [&](int m, int v) { sum[m][v] = Mask::drop<Acc>(sum[m][v], g.kept + m * kKept, c + v * kWidth<Acc>); });
    if (base.data == nullptr)
      for_accumulators<MR, NV>([&](int m, int v) { sum[m][v] *= scale; });
    else
      for_accumulators<MR, NV>([&](int m, int v) {
        const int64_t o = c + v * kWidth<Acc>;
        const Y* from = g.from[m] + o;
        sum[m][v] = multiply_add(sum[m][v], scale, whole ? load<Acc>(from) : load_some<Acc>(from, g.columns - o));
      });
    if constexpr (whole)
      for_accumulators<MR, 1>([&](int m, int) { store_row<Acc, Y, NV>(g.to[m] + c, sum[m]); });
    else
      for_accumulators<MR, NV>([&](int m, int v) {
        const int64_t o = c + v * kWidth<Acc>;
        store_some<Acc>(g.to[m] + o, sum[m][v], g.columns - o);
      });
  }

  template <class Y>
  __attribute__((noinline)) void store_elements(Vec<Acc> sum, const Y* from, Y* to, int64_t o, int64_t count,
                                                const uint8_t* kept) const {
    for (int64_t i = 0; i < count; i++) {
      Acc value = scale * sum[i];
      if (mask.on) value = Mask::drop<Acc>(value, kept, o + i);
      if (from != nullptr) value += to_acc<Acc>(from[(o + i) * base.column_stride]);
      to[(o + i) * y.column_stride] = from_acc<Y>(value);
    }
  }
};

// dH to dx
template <class Acc, class Product>
Expand<Acc, Product> expand_x(const BackwardParams& p) {
  const Shape& s = p.shape;
  const Mask mask(p.dropout);
  const Param G = blocks_of_columns(p.adapter.A_general, s.N / s.k);
  const Rows added = p.add_to_grad_x ? p.grad_x : Rows{};
  return {s.N, s.k, s.r, s.h, transposed(p.adapter.A), G, Acc(mask.keep_scale), mask, added, p.grad_x};
}

}  // namespace gralora::cpu::GRALORA_ISA
