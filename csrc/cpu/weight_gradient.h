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

  // Tokens of a segment: `count` of them are packed, those from `first` on are in turn. The right
  // factor is their part of x; `next` is the token that is read after them, or -1.
  struct Tokens {
    int64_t count, first;
    const Part& part;
    int64_t next;
  };

  // sums (+)= the part of some tokens, whose rows as the right factor are x
  void add(const Acc* packed, const Tokens& t, const Source<Acc>& x, bool accumulate, Acc* sums) const {
    const Acc* general = packed + Product::packed_latents_size(s.r, t.count);
    const int64_t steps = Product::steps(t.part.tokens);
    for_column_groups<Acc>(t.part.columns, [&](auto nv, int64_t i) {
      constexpr int kColumns = decltype(nv)::value * kWidth<Acc>;
      const NextTokens<kColumns, Product::kTerms> next(t.part.x, t.next, t.part.column + i);
      const auto add_group = [&](auto group, const Acc* latents, int64_t c, Acc* to, const auto& beside) {
        micro_tile(group, nv, steps, Product::packed(group, latents, t.count, c, t.first), x.data + i, x.ld, accumulate,
                   to + c * kMostColumns + i, beside);
      };
      Product::for_row_groups(s.r, [&](auto group, int64_t c) {
        if (c == 0)
          add_group(group, packed, c, sums, next);
        else
          add_group(group, packed, c, sums, Nothing{});
      });
      Product::for_row_groups(
          s.h, [&](auto group, int64_t c) { add_group(group, general, c, sums + s.r * kMostColumns, Nothing{}); });
    });
  }

 private:
  // A function of its own: inlined among other code, GCC would keep part of the sums in memory.
  template <class Group, int NV, class Left, class Beside>
  __attribute__((noinline)) static void micro_tile(Group group, Int<NV>, int64_t steps, const Left& latents,
                                                   const Acc* x, int64_t ld, bool accumulate, Acc* to,
                                                   const Beside& beside) {
    typename Product::template Sums<Group, NV> sums(group);
    sums.add(steps, latents, Source<Acc>{x, ld}, beside);
    sums.store_to(to, kMostColumns, accumulate);
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
