// SPDX-License-Identifier: Apache-2.0
// weight_gradient: sums over tokens of a latent times a wide activation, for one chunk of columns
// of one block.
//
//   sums[c, i]     = sum_t v[t, b*r + c] * x'[t, column + i]      c = 0 .. r-1
//   sums[r + c, i] = sum_t v[t, k*r + c] * x'[t, column + i]      c = 0 .. h-1
//
// U and g give dB and dBg; dH and x give dA and dAg. x' is x after dropout. Tokens are taken in
// slices: each is summed in registers, then added to `sums` in order, so that long sums lose fewer
// digits. `sums` has rows of kMostColumns elements and stays in L2.
#pragma once

#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Product>
struct WeightGradient {
  using Acc = typename Product::Acc;
  using Latent = typename Product::Latent;
  static constexpr int64_t kTokens = 128 * Product::kTerms;  // of a slice

  const Shape& s;

  // The latents of `count` tokens that are multiplied by block b, packed
  int64_t packed_size(int64_t count) const {
    return Product::packed_latents_size(s.r, count) + Product::packed_latents_size(s.h, count);
  }
  void pack(const Latent* v, int64_t b, int64_t count, Acc* to) const {
    const int64_t ld = s.k * s.r + s.h;
    Product::pack_latents(v + b * s.r, ld, s.r, count, to);
    Product::pack_latents(v + s.k * s.r, ld, s.h, count, to + Product::packed_latents_size(s.r, count));
  }

  // A slice of a segment: the latents of `count` tokens are packed, and the slice begins with
  // token `first` of them. `part` is its part of x or g; `next` is the token that is read after
  // it, for software prefetch, or -1.
  struct Slice {
    int64_t count, first;
    const Part& part;
    int64_t next;
  };

  // Writes the sums of a slice, or adds them. x: the rows of its part, as the right factor.
  void add(const Acc* packed, const Slice& t, const Source<Acc>& x, bool accumulate, Acc* sums) const {
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
  // Not inlined, since GCC would then hold part of the sums in memory.
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
