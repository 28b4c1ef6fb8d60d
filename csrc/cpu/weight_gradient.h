// SPDX-License-Identifier: Apache-2.0
// weight_gradient: sums over tokens of latent times wide activation, for one chunk of columns of
// one block.
//
//   sums[c, i] = sum_t v[t, b*r + c] * x'[t, column + i]   c = 0 .. r-1       sums[r + c, i] = sum_t v[t, k*r + c] * x'[...]
//
// x' is x after dropout. U and g give dB and dBg; dH and x give dA and dAg. Tokens are taken in
// blocks, each summed in registers, then added in order, so that long sums lose less; `sums`, rows
// of kMostColumns, stays in L2.
#pragma once

#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Product>
struct WeightGradient {
  using Acc = typename Product::Acc;
  using Latent = typename Product::Latent;
  static constexpr int64_t kTokens = 128 * Product::kTerms;  // of a block

  const Shape& s;

  // The latents of `count` tokens that meet block b
  int64_t packed_size(int64_t count) const {
    return Product::packed_latents_size(s.r, count) + Product::packed_latents_size(s.h, count);
  }
  void pack(const Latent* v, int64_t b, int64_t count, Acc* to) const {
    const int64_t ld = s.k * s.r + s.h;
    Product::pack_latents(v + b * s.r, ld, s.r, count, to);
    Product::pack_latents(v + s.k * s.r, ld, s.h, count, to + Product::packed_latents_size(s.r, count));
  }

  // sums (+)= the part of tokens first .. first + tokens of the `count` that are packed; x: their
  // rows as the right factor
  void add(const Acc* packed, int64_t count, int64_t first, int64_t tokens, const Source<Acc>& x, int64_t columns,
           bool accumulate, Acc* sums) const {
    const auto add_ranks = [&](int64_t ranks, const Acc* latents, const Source<Acc>& right, auto nv, Acc* to) {
      Product::for_row_groups(ranks, [&](auto group, int64_t c) {
        micro_tile(group, nv, Product::steps(tokens), Product::packed(group, latents, count, c, first), right,
                   accumulate, to + c * kMostColumns);
      });
    };
    for_column_groups<Acc>(columns, [&](auto nv, int64_t i) {
      const Source<Acc> right{x.data + i, x.ld, x.piece, x.pieces};
      add_ranks(s.r, packed, right, nv, sums + i);
      if (s.h > 0)
        add_ranks(s.h, packed + Product::packed_latents_size(s.r, count), right, nv, sums + s.r * kMostColumns + i);
    });
  }

 private:
  // A function of its own: inlined among other code, GCC would keep part of the sums in memory.
  template <class Group, int NV, class Left>
  __attribute__((noinline)) static void micro_tile(Group group, Int<NV>, int64_t steps, const Left& latents,
                                                   const Source<Acc>& x, bool accumulate, Acc* to) {
    typename Product::template Sums<Group, NV> sums(group);
    sums.add(steps, latents, x, Nothing{});
    sums.store_to(to, kMostColumns, accumulate);
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
