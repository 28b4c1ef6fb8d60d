// SPDX-License-Identifier: Apache-2.0
// weight_gradient: sums over tokens of rank times wide activation, for one chunk of columns of one
// block.
//
//   sums[c, i] = sum_t v[t, b*r + c] * x'[t, column + i]   c = 0 .. r-1       sums[r + c, i] = sum_t v[t, k*r + c] * x'[...]
//
// x' is x after dropout. U and g give dB and dBg; dH and x give dA and dAg. Tokens are taken in
// blocks of kTokens, or of as many pairs, each summed in registers, then added in order, so that
// long sums lose less; `sums` stays in L2.
#pragma once

#include "pieces.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int64_t kTokens = 128;

// PackedRows of ranks that meet rows of x, which lie too far apart for L1's own prefetcher: those
// that follow are fetched. kKeeps: each is left in `kept`, kTile from the last one.
template <class Acc, int MR, int NV, bool kKeeps>
struct RanksAndRows : PackedRows<Acc, MR> {
  static constexpr int64_t kAhead = 12;
  uintptr_t next_row, end;
  int64_t row_bytes;
  Acc* kept;
  RanksAndRows(const Acc* ranks, const Source<Acc>& x, int64_t steps, Acc* kept)
      : PackedRows<Acc, MR>{ranks},
        next_row(address(x.data, smaller(kAhead, steps) * x.ld)),
        end(address(x.data, steps * x.ld)),
        row_bytes(x.ld * int64_t(sizeof(Acc))),
        kept(kept) {}
  inline __attribute__((always_inline)) void keep(int p, const Vec<Acc> (&row)[NV]) const {
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) store<Acc>(kept + p * kTile<Acc> + v * kWidth<Acc>, row[v]);
  }
  template <int steps>
  inline __attribute__((always_inline)) void next() {
    PackedRows<Acc, MR>::template next<steps>();
    if (kKeeps) kept += steps * kTile<Acc>;
    for (int p = 0; p < steps && next_row != end; p++, next_row += uintptr_t(row_bytes))
      for (int64_t byte = 0; byte < NV * kWidth<Acc> * int64_t(sizeof(Acc)); byte += 64)
        prefetch(next_row + uintptr_t(byte));
  }
};
template <class Acc, int MR, int NV>
constexpr bool keeps_rows<RanksAndRows<Acc, MR, NV, true>> = true;

// Columns of rows as they lie: a[m][p] = data[p*ld + m]
template <class Acc>
struct ColumnsOfRows {
  const Acc* data;
  int64_t ld;
  inline __attribute__((always_inline)) Acc at(int m, int p) const { return data[p * ld + m]; }
  template <int steps>
  inline __attribute__((always_inline)) void next() {
    data += steps * ld;
  }
};

template <class Acc, class Product>
struct WeightGradient {
  static constexpr int kTerms = Product::kTerms;
  int64_t k, r, h;
  int pieces = 1;  // of the ranks, by tiles

  // The ranks of `count` tokens that meet block b, as add() takes them: (r + h) * steps(count)
  // elements, times pieces
  template <class Rank>
  void read_ranks(const Rank* v, int64_t b, int64_t count, Acc* to) const {
    read_group(v + b * r, r, count, to);
    read_group(v + k * r, h, count, to + r * pieces * steps(count));
  }

  // sums (+)= the part of tokens first .. first + tokens of the `count` in `ranks`, where first is
  // even; x: their rows, or pairs of them, with zeros up to a multiple of kDepth; ahead: the rows
  // of as many tokens, which will be read next; kept: kept_size elements for columns of x's rows,
  // where these end within a vector, or lie in so few sets of L1 (48 KiB, 12 ways) that each group
  // of ranks would fetch them anew.
  static constexpr int64_t kept_size = kTerms == 1 ? kTokens * kTile<Acc> : 0;
  void add(const Acc* ranks, int64_t count, int64_t first, int64_t tokens, const Source<Acc>& x, int64_t columns,
           bool accumulate, Acc* sums, Prefetch ahead, Acc* kept) const {
    int64_t groups = 0;  // of ranks: each fetches its part of what lies ahead
    for_groups<Product>(r, [&](auto, int64_t) { groups++; });
    const bool keep = kTerms == 1 && x.ld * int64_t(sizeof(Acc)) % 512 == 0 && (groups > 1 || h > 0);
    for_column_tiles<Acc>(round_up(columns, kWidth<Acc>), [&](auto nv, int64_t i) {
      constexpr int NV = decltype(nv)::value;
      const bool at_edge = kTerms == 1 && i + NV * kWidth<Acc> > columns;
      if (at_edge) keep_rows({x.data + i, x.ld}, tokens, columns - i, kept);
      int64_t begun = 0;
      const auto add_group = [&](int64_t group, const Acc* from, Acc* to) {
        for_groups<Product>(group, [&](auto rows, int64_t c) {
          const int64_t ld = pieces * steps(count);
          const Acc* a = from + c * ld + first / kTerms * (kByTiles<Product> ? 1 : decltype(rows)::value);
          const Source<Acc> left{a, ld, steps(count), pieces}, right{x.data + i, x.ld, x.piece, x.pieces};
          const bool use_kept = at_edge || (keep && begun > 0);
          const auto fetch = [=, turn = begun++ * kSteps](int64_t p, int part) mutable {
            if (p != turn) return;
            ahead.template rows_of<kPartSteps * kTerms, NV * kWidth<Acc>>((p + part * kPartSteps) * kTerms, i);
            if (part == kParts - 1) turn += groups * kSteps;
          };
          Acc* at = to + c * kChunk + i;
          if constexpr (kTerms == 2)
            tile<kRow<Acc>>(rows, nv, steps(tokens), left, right, accumulate, at, fetch);
          else if (use_kept)
            tile<kTile<Acc>>(rows, nv, tokens, left, {kept, kTile<Acc>}, accumulate, at, fetch);
          else if (keep)
            tile_of_rows<true>(rows, nv, tokens, left, right, accumulate, at, kept, fetch);
          else
            tile_of_rows<false>(rows, nv, tokens, left, right, accumulate, at, kept, fetch);
        });
      };
      add_group(r, ranks, sums);
      add_group(h, ranks + r * pieces * steps(count), sums + r * kChunk);
    });
  }

  // The gradient itself, from all tokens, where they are one block and the ranks of a column are
  // its rows (dA). Ranks are the vectors here: nothing is to be transposed.
  //
  //   out[i*ld + c] = scale * sum_t x'[t, column + i] * v[t, b*r + c]
  //
  // read_rank_rows: the ranks of `count` tokens that meet block b, in tiles of kTile;
  // rank_rows_size(count) elements
  int64_t rank_rows_size(int64_t count) const { return panel_size<Acc>(steps(count), r); }
  template <class Rank>
  void read_rank_rows(const Rank* v, int64_t b, int64_t count, Acc* to) const {
    const Param rows{const_cast<Rank*>(v), DTypeOf<Rank>::value, 0, k * r + h, 1};
    if constexpr (kTerms == 2)
      pack_pairs(rows, b * r, count, r, Product::kDepth, to);
    else
      pack_panel<Acc>(rows, b * r, count, r, to);
  }
  // x: rows of all tokens, or pairs of them; each(p) as in multiply_steps
  template <class P, class Each>
  void write_rows(const Acc* ranks, int64_t tokens, const Source<Acc>& x, int64_t columns, Acc scale, P* out,
                  int64_t ld, Each&& each) const {
    for_row_groups(columns, [&](auto rows, int64_t i) {
      for_column_tiles<Acc>(round_up(r, kWidth<Acc>), [&](auto nv, int64_t c) {
        tile_of_columns(rows, nv, steps(tokens), Source<Acc>{x.data + i, x.ld}, ranks + c * steps(tokens), scale,
                        out + i * ld + c, ld, r - c, each);
      });
    });
  }

  static int64_t steps(int64_t tokens) { return round_up(ceil_div(tokens, kTerms), Product::kDepth); }

 private:
  // The first `columns` columns of x's rows, with zeros beyond
  static void keep_rows(const Source<Acc>& x, int64_t rows, int64_t columns, Acc* kept) {
    for (int64_t t = 0; t < rows; t++)
      for (int64_t c = 0; c < kTile<Acc>; c += kWidth<Acc>)
        store<Acc>(kept + t * kTile<Acc> + c, load_some<Acc>(x.data + t * x.ld + smaller(c, columns), columns - c));
  }

  // Functions of their own, as in Expand. Rows of x are ldx apart, or as far as it says.
  template <int ldx, int MR, int NV, class Each>
  __attribute__((noinline)) static void tile(Int<MR>, Int<NV>, int64_t steps, const Source<Acc>& ranks,
                                             const Source<Acc>& x, bool accumulate, Acc* sums, Each&& each) {
    Vec<Acc> acc[MR][NV] = {};
    multiply_packed<Product>(steps, ranks.data, x.data, ldx, acc, each);
    store_sums(acc, accumulate, sums);
  }
  template <bool keep, int MR, int NV, class Each>
  __attribute__((noinline)) static void tile_of_rows(Int<MR>, Int<NV>, int64_t steps, const Source<Acc>& ranks,
                                                     const Source<Acc>& x, bool accumulate, Acc* sums, Acc* kept,
                                                     Each&& each) {
    Vec<Acc> acc[MR][NV] = {};
    const RanksAndRows<Acc, MR, NV, keep> a(ranks.data, x, steps, kept);
    multiply_steps<Product>(steps, a, x.data, x.ld, acc, each);
    store_sums(acc, accumulate, sums);
  }
  // The first `some` ranks, or all of the tile's
  template <int MR, int NV, class P, class Each>
  __attribute__((noinline)) static void tile_of_columns(Int<MR>, Int<NV>, int64_t steps, const Source<Acc>& x,
                                                        const Acc* ranks, Acc scale, P* out, int64_t ld, int64_t some,
                                                        Each&& each) {
    Vec<Acc> acc[MR][NV] = {};
    multiply_steps<Product>(steps, ColumnsOfRows<Acc>{x.data, x.ld}, ranks, kTile<Acc>, acc, each);
    for_accumulators<MR, NV>([&](int m, int v) { acc[m][v] *= scale; });
    if (some >= NV * kWidth<Acc>)
      for_accumulators<MR, 1>([&](int m, int) { store_row<Acc, P, NV>(out + m * ld, acc[m]); });
    else
      for_accumulators<MR, NV>([&](int m, int v) {
        const int64_t c = v * kWidth<Acc>;
        store_some<Acc>(out + m * ld + c, acc[m][v], larger(some - c, 0));
      });
  }
  template <int MR, int NV>
  static inline __attribute__((always_inline)) void store_sums(const Vec<Acc> (&acc)[MR][NV], bool accumulate,
                                                               Acc* sums) {
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

  // to[c*steps + t*MR + m] = v[t, c + m] for each group of MR ranks; as pairs, t counts pairs of
  // tokens. By tiles each rank is a row: to[(c*pieces + piece)*steps + t], with zeros at its end.
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
