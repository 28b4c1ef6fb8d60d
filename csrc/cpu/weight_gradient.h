// weight_gradient: sums over tokens of rank times wide activation, for one chunk of columns of one block.
//
//   sums[c, i] = sum_t v[t, b*r + c] * x'[t, column + i]   c = 0 .. r-1       sums[r + c, i] = sum_t v[t, k*r + c] * x'[...]
//
// x' is x after dropout. U and g give dB and dBg; dH and x give dA and dAg. Tokens are taken in blocks of kTokens, or
// of as many pairs, each summed in registers, then added in order, so that long sums lose less; `sums` stays in L2.
#pragma once

#include "pieces.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int64_t kTokens = 128;

// PackedRows of ranks, beside which the rows of x that follow are fetched into L1: they lie too far apart for its own prefetcher.
template <class Acc, int MR, int NV>
struct RanksAndRows : PackedRows<Acc, MR> {
  static constexpr int64_t kAhead = 12;
  const Acc *next_row, *end;
  int64_t ld;
  RanksAndRows(const Acc* ranks, const Acc* x, int64_t ld, int64_t steps)
      : PackedRows<Acc, MR>{ranks}, next_row(x + smaller(kAhead, steps) * ld), end(x + steps * ld), ld(ld) {}
  template <int steps>
  inline __attribute__((always_inline)) void next() {
    PackedRows<Acc, MR>::template next<steps>();
    for (int p = 0; p < steps && next_row != end; p++, next_row += ld)
      for (int64_t byte = 0; byte < NV * kWidth<Acc> * int64_t(sizeof(Acc)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(next_row) + byte);
  }
};

template <class Acc, class Product>
struct WeightGradient {
  static constexpr int kTerms = Product::kTerms;
  int64_t k, r, h;
  int pieces = 1;  // of the ranks, by tiles

  // The ranks of `count` tokens that meet block b, as add() takes them: (r + h) * steps(count) elements, times pieces
  template <class Rank>
  void read_ranks(const Rank* v, int64_t b, int64_t count, Acc* to) const {
    read_group(v + b * r, r, count, to);
    read_group(v + k * r, h, count, to + r * pieces * steps(count));
  }

  // sums (+)= the part of tokens first .. first + tokens of the `count` in `ranks`, where first is even; x: their rows, or pairs
  // of them, with zeros up to a multiple of kDepth; ahead: the rows of as many tokens, which will be read next.
  void add(const Acc* ranks, int64_t count, int64_t first, int64_t tokens, Source<Acc> x, int64_t columns,
           bool accumulate, Acc* sums, Prefetch ahead) const {
    if (x.ld == kRow<Acc>)
      add_rows<kRow<Acc>>(ranks, count, first, tokens, x, columns, accumulate, sums, ahead);
    else
      add_rows<0>(ranks, count, first, tokens, x, columns, accumulate, sums, ahead);
  }

  static int64_t steps(int64_t tokens) { return round_up(ceil_div(tokens, kTerms), Product::kDepth); }

 private:
  // ldx: the distance of x's rows where it is known, which saves 2 %; else 0
  template <int ldx>
  void add_rows(const Acc* ranks, int64_t count, int64_t first, int64_t tokens, Source<Acc> x, int64_t columns,
                bool accumulate, Acc* sums, Prefetch ahead) const {
    int64_t groups = 0;  // of ranks: each fetches its part of what lies ahead
    for_groups<Product>(r, [&](auto, int64_t) { groups++; });
    for_column_tiles<Acc>(round_up(columns, kWidth<Acc>), [&](auto nv, int64_t i) {
      constexpr int NV = decltype(nv)::value;
      int64_t begun = 0;
      const auto add_group = [&](int64_t group, const Acc* from, Acc* to) {
        for_groups<Product>(group, [&](auto rows, int64_t c) {
          const int64_t ld = pieces * steps(count);
          const Acc* a = from + c * ld + first / kTerms * (kByTiles<Product> ? 1 : decltype(rows)::value);
          const Source<Acc> left{a, ld, steps(count), pieces}, right{x.data + i, x.ld, x.piece, x.pieces};
          const auto fetch = [=, turn = begun++ * kSteps](int64_t p, int part) mutable {
            if (p != turn) return;
            ahead.template rows_of<kPartSteps * kTerms, NV * kWidth<Acc>>((p + part * kPartSteps) * kTerms, i);
            if (part == kParts - 1) turn += groups * kSteps;
          };
          tile<ldx>(rows, nv, steps(tokens), left, right, accumulate, to + c * kChunk + i, fetch);
        });
      };
      add_group(r, ranks, sums);
      add_group(h, ranks + r * pieces * steps(count), sums + r * kChunk);
    });
  }

  // A function of its own, as in Expand.
  template <int ldx, int MR, int NV, class Each>
  __attribute__((noinline)) static void tile(Int<MR>, Int<NV>, int64_t steps, const Source<Acc>& ranks,
                                             const Source<Acc>& x, bool accumulate, Acc* sums, Each&& each) {
    Vec<Acc> acc[MR][NV] = {};
    const int64_t ld = ldx > 0 ? ldx : x.ld;
    multiply_steps<Product>(steps, RanksAndRows<Acc, MR, NV>(ranks.data, x.data, ld, steps), x.data, ld, acc, each);
    for_accumulators<MR, NV>([&](int m, int v) {
      Acc* at = sums + m * kChunk + v * kWidth<Acc>;
      store<Acc>(at, accumulate ? load<Acc>(at) + acc[m][v] : acc[m][v]);
    });
  }
  template <int ldx, int MR, bool all, int NV, class Each>
  __attribute__((noinline)) static void tile(UpTo<MR, all> rows, Int<NV>, int64_t steps, const Source<Acc>& ranks,
                                             const Source<Acc>& x, bool accumulate, Acc* sums, Each&& each) {
    typename Product::Sums total(rows.count(), NV * kWidth<Acc>);
    if (accumulate) total.load(sums, kChunk);
    total.add(steps, ranks, x, each);
    total.store(sums, kChunk);
  }

  // to[c*steps + t*MR + m] = v[t, c + m] for each group of MR ranks; as pairs, t counts pairs of tokens. By tiles each rank is a row:
  // to[(c*pieces + piece)*steps + t], with zeros at its end.
  template <class Rank>
  void read_group(const Rank* v, int64_t group, int64_t count, Acc* to) const {
    const int64_t ld = k * r + h;
    if constexpr (kByTiles<Product>) {
      for (int64_t c = 0; c < group; c += kWidth<Acc>)
        for (int64_t t = 0; t < steps(count); t += kWidth<Acc>)
          turn_ranks(v + 2 * t * ld + c, ld, count - 2 * t, smaller(kWidth<Acc>, group - c), pieces,
                     to + c * pieces * steps(count) + t, steps(count));
    } else {
      for_row_groups(group, [&](auto mr, int64_t c) {
        constexpr int MR = decltype(mr)::value;
        Acc* at = to + c * steps(count);
        for (int64_t t = 0; t < count; t += kTerms, at += MR) {
          const Rank* from = v + t * ld + c;
          if constexpr (kTerms == 2)
            pair_two_rows(from, t + 1 < count ? from + ld : nullptr, MR, at);
          else if constexpr (std::is_same_v<Rank, Acc>)
            memcpy(at, from, MR * sizeof(Acc));
          else
            for (int m = 0; m < MR; m++) at[m] = to_acc<Acc>(from[m]);
        }
      });
    }
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
