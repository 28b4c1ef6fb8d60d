// SPDX-License-Identifier: Apache-2.0
// The product of factors whose elements are of the accumulation type: float, or double in the
// portable kernels.
//
// All products have the members below, which project.h, expand.h and weight_gradient.h use. The
// other products are in product_pairs.h and product_amx.h.
//
//   Acc, Latent                the types of a sum, and of an element of U and dH
//   kTerms                     terms of a sum in an element of a factor: 1, or 2 in a pair
//   steps                      elements of a factor for a sum of so many terms
//   kRows, for_row_groups      the most rows of a micro-tile, and how rows are cut into groups
//   Scope                      an object that must exist while micro-kernels are executed
//   for_dtype                  calls a function with the type of an activation's elements
//   Sums                       a micro-tile: add(), store_to(), for_rows()
//   left_rows, right_rows      rows of x or g as left factor; as right one of a sum over tokens
//   left_of                    rows of g as the left factor, after right_rows() has read them
//   left                       rows of a factor as the micro-kernel takes them
//   panel_size, read_panel     a block of a parameter as the right factor
//   latents_size, read_latents                   latents as the left factor
//   packed_latents_size, pack_latents, packed    latents as the left factor of a sum over tokens
#pragma once

#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {

// The latents of some tokens as left factors: those of one block, and the general ones
template <class Acc>
struct Latents {
  Source<Acc> block, general;
  Latents from_token(int64_t m) const { return {block.from_row(m), general.from_row(m)}; }
};

// A micro-tile in registers: a group of MR rows by NV vectors of columns
template <class Product, class Acc, class Group, int NV>
struct VectorSums {
  static constexpr int MR = Group::value;
  Vec<Acc> sum[MR][NV] = {};
  explicit VectorSums(Group) {}

  template <class Left, class Beside>
  inline __attribute__((always_inline)) void add(int64_t steps, const Left& a, const Source<Acc>& b, Beside beside) {
    multiply<Product>(steps, a, b.data, b.ld, sum, beside);
  }
  inline __attribute__((always_inline)) void store_to(Acc* to, int64_t ld, bool accumulate) const {
    for_sums<MR, NV>([&](int m, int v) {
      Acc* at = to + m * ld + v * kWidth<Acc>;
      store<Acc>(at, accumulate ? load<Acc>(at) + sum[m][v] : sum[m][v]);
    });
  }
  // Calls f(vectors, first row) once, since the whole micro-tile is in registers.
  template <class F>
  inline __attribute__((always_inline)) void for_rows(F&& f) {
    f(sum, 0);
  }
};

// What the products on vector registers share
template <class Acc>
struct VectorProduct {
  static constexpr int kRows = kMR;
  struct Scope {};
  template <class F>
  static inline __attribute__((always_inline)) void for_row_groups(int64_t rows, F&& f) {
    GRALORA_ISA::for_row_groups(rows, f);
  }
  template <class Group>
  static inline __attribute__((always_inline)) auto left(Group, const Source<Acc>& rows) {
    return LeftRows<const Acc, Group::value>(rows.data, rows.ld);
  }
};

template <class Accumulated>
struct Fp32 : VectorProduct<Accumulated> {
  using Acc = Accumulated;
  using Latent = Acc;
  static constexpr int kTerms = 1;

  static inline __attribute__((always_inline)) Vec<Acc> add(Vec<Acc> sum, Acc a, Vec<Acc> b) { return sum + a * b; }
  template <class Group, int NV>
  using Sums = VectorSums<Fp32, Acc, Group, NV>;
  template <class F>
  static void for_dtype(DType dtype, F&& f) {
    GRALORA_ISA::for_dtype<Acc>(dtype, f);
  }
  static int64_t steps(int64_t terms) { return terms; }

  // ---------------------------------------------------------------- x and g

  static Source<Acc> left_rows(Reading reading, const Part& part, const RowBuffer<Acc>& buffer) {
    return read_rows<Acc>(reading, part, buffer);
  }
  static Source<Acc> right_rows(Reading reading, const Part& part, const RowBuffer<Acc>& buffer) {
    return read_rows<Acc>(reading, part, buffer);
  }
  // The left factor of the rows whose right_rows() are `right`
  static Source<Acc> left_of(const Source<Acc>& right, const Part&) { return right; }

  // ---------------------------------------------------------------- parameters

  static int64_t panel_size(DType, int64_t rows, int64_t columns) {
    return GRALORA_ISA::panel_size<Acc>(rows, columns);
  }
  static Panel<Acc> read_panel(Packing packing, const BlockOf& block, int /*pieces*/, Acc* scratch) {
    return GRALORA_ISA::read_panel<Acc>(packing, block, scratch);
  }

  // ---------------------------------------------------------------- latents

  static int64_t latents_size(const Shape&, int64_t /*tokens*/) { return 0; }
  // u: the latents of the first token; those of the next one are k*r + h elements further.
  static Latents<Acc> read_latents(const Shape& s, const Latent* u, int64_t block, int64_t /*tokens*/, Acc*) {
    const int64_t ld = s.k * s.r + s.h;
    return {{u + block * s.r, ld}, {u + s.k * s.r, ld}};
  }

  // Packs latents v[t, c] of some tokens into left micro-panels of MR ranks. With c the first rank
  // of a group, to[c*tokens + t*MR + m] = v[t, c + m].
  static int64_t packed_latents_size(int64_t ranks, int64_t tokens) { return ranks * tokens; }
  static void pack_latents(const Latent* v, int64_t ld, int64_t ranks, int64_t tokens, Acc* to) {
    GRALORA_ISA::for_row_groups(ranks, [&](auto group, int64_t c) {
      constexpr int MR = decltype(group)::value;
      for (int64_t t = 0; t < tokens; t++) memcpy(to + c * tokens + t * MR, v + t * ld + c, MR * sizeof(Acc));
    });
  }
  // The left micro-panel, which pack_latents() made, of the group that begins at rank c, from
  // token `first` on
  template <class Group>
  static inline __attribute__((always_inline)) auto packed(Group, const Acc* latents, int64_t tokens, int64_t c,
                                                           int64_t first) {
    return LeftPacked<Acc, Group::value>{latents + c * tokens + first * Group::value};
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
