// SPDX-License-Identifier: Apache-2.0
// The product of both factors as numbers of the accumulation type: float, or double in the portable
// kernels.
//
// What project.h, expand.h and weight_gradient.h ask of a product, this one or that of
// product_pairs.h or product_amx.h, is what this file has:
//
//   Acc, Latent, kTerms        an element of sums and factors; of U and dH; terms of a sum in an element of a factor
//   kRows, for_row_groups      the most rows of a micro-kernel, and how rows are cut for it
//   Scope                      is held while products are made
//   for_dtype, steps           dtypes of activations that it takes; elements of a factor for a sum of so many terms
//   Sums                       of a micro-kernel: add(), store_to(), for_rows()
//   left_rows, right_rows      rows of x or g as the left factor, and as the right one of a sum over tokens
//   panel_size, read_panel     a block of a parameter as the right factor
//   latents_size, read_latents                   latents as the left factor
//   packed_latents_size, pack_latents, packed    latents as the left factor of a sum over tokens
#pragma once

#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {

// The latents of some tokens as left factors: those of one block, and the general ones.
template <class Acc>
struct Latents {
  Source<Acc> block, general;
  Latents from_token(int64_t m) const { return {block.from_row(m), general.from_row(m)}; }
};

// Sums of a group of MR rows and NV vectors of columns, in registers
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
  // f(vectors, first row), for groups of rows that fit into registers
  template <class F>
  inline __attribute__((always_inline)) void for_rows(F&& f) {
    f(sum, 0);
  }
};

// What products of vectors share
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
  static void for_dtype(DType dtype, F&& f) {  // of an activation
    GRALORA_ISA::for_dtype<Acc>(dtype, f);
  }
  static int64_t steps(int64_t terms) { return terms; }  // of a sum of so many terms

  // ---------------------------------------------------------------- x and g

  static Source<Acc> left_rows(Reading reading, const Part& part, const Block<Acc>& block) {
    return read_rows<Acc>(reading, part, block);
  }
  static Source<Acc> right_rows(Reading reading, const Part& part, const Block<Acc>& block) {
    return read_rows<Acc>(reading, part, block);
  }
  // The left factor of rows whose right_rows() are `right`
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
  // u: of a token, its successors k*r + h further on each
  static Latents<Acc> read_latents(const Shape& s, const Latent* u, int64_t block, int64_t /*tokens*/, Acc*) {
    const int64_t ld = s.k * s.r + s.h;
    return {{u + block * s.r, ld}, {u + s.k * s.r, ld}};
  }

  // Latents v[t, c] of some tokens in groups of MR ranks: to[c*tokens + t*MR + m] = v[t, c + m]
  static int64_t packed_latents_size(int64_t ranks, int64_t tokens) { return ranks * tokens; }
  static void pack_latents(const Latent* v, int64_t ld, int64_t ranks, int64_t tokens, Acc* to) {
    GRALORA_ISA::for_row_groups(ranks, [&](auto group, int64_t c) {
      constexpr int MR = decltype(group)::value;
      for (int64_t t = 0; t < tokens; t++) memcpy(to + c * tokens + t * MR, v + t * ld + c, MR * sizeof(Acc));
    });
  }
  // Of these, a group's from rank c and token `first` on
  template <class Group>
  static inline __attribute__((always_inline)) auto packed(Group, const Acc* latents, int64_t tokens, int64_t c,
                                                           int64_t first) {
    return LeftPacked<Acc, Group::value>{latents + c * tokens + first * Group::value};
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
