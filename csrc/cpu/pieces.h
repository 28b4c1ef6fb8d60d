// SPDX-License-Identifier: Apache-2.0
// Floats as sums of bf16: where a processor has AMX (tiles.h), parameters and ranks that are no
// bf16 meet activations that are, as some products of bf16, of which sixteen are made in the time
// of one of floats.
//
//   f = f0 + f1 + f2     f0: the upper 8 bits of f's significand; f1: what is left, rounded to 8 bits; f2: what is left then
//
// Three pieces are f (to 2^-133); a float16 is the sum of two. U and the gradients of parameters
// are made with all of them: as exact as sums of floats. y and dx are rounded to bf16: for them two
// pieces of each factor do, within 2^-16. An infinity has no second piece and comes out as NaN.
//
// Float activations would need six products, and were slower so: benchmarks/results/NOTES.md.
#pragma once

#include "pairs.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int64_t kTokensToSplit = 128;  // from as many on, splitting the parameters pays
constexpr int64_t kStepTerms = 32;       // of a sum, in a step of tiles

// From as many tokens on, tiles multiply; all_bf16: nothing is split, but ranks are rounded
inline int64_t tokens_for_tiles(bool all_bf16) { return all_bf16 ? kTokensToRound : kTokensToSplit; }

// Whether ranks that are rounded can be multiplied as they lie: in whole steps, or only in whole
// pairs
inline bool in_whole_steps(const Shape& s) { return s.r % kStepTerms == 0 && s.h % kStepTerms == 0; }
inline bool in_whole_pairs(const Shape& s) { return even(s.r) && even(s.h); }

inline int pieces_of(DType dtype) { return dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : 3; }

// The ranks of some tokens as the left factor: those of block j begin at rows.data + j*block, the
// general ones at rows.data + general; with as many steps each
template <class Acc>
struct Ranks {
  Source<Acc> rows;
  int64_t block, general, steps, general_steps;

  // u [tokens, k*r + h] as it lies, of Acc or of numbers of which one Acc holds kTerms
  template <class Rank>
  static Ranks of(const Rank* u, const Shape& s) {
    constexpr int kTerms = sizeof(Acc) / sizeof(Rank);
    const int64_t r = s.r / kTerms, h = s.h / kTerms;
    return {{reinterpret_cast<const Acc*>(u), s.k * r + h}, r, s.k * r, r, h};
  }
  Source<Acc> at(int64_t offset) const { return {rows.data + offset, rows.ld, rows.piece, rows.pieces}; }
  Ranks from_token(int64_t m) const { return {at(m * rows.ld), block, general, steps, general_steps}; }
};

#if defined(__AVX512F__) && defined(GRALORA_HAVE_TILES)

// The upper halves of a's and b's lanes: in a row, a's first, or by turns
inline __m512i halves_in_a_row() {
  alignas(64) static const uint16_t kHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_load_si512(kHalves);
}
inline __m512i halves_by_turns() {
  alignas(64) static const uint16_t kHalves[32] = {1,  33, 3,  35, 5,  37, 7,  39, 9,  41, 11, 43, 13, 45, 15, 47,
                                                   17, 49, 19, 51, 21, 53, 23, 55, 25, 57, 27, 59, 29, 61, 31, 63};
  return _mm512_load_si512(kHalves);
}

// store(i, halves) for each piece i of a and b; a single one is all of them, in bf16. The first is
// cut, since rounding could make it infinite.
template <class Store>
inline __attribute__((always_inline)) void for_pieces(Vec<float> a, Vec<float> b, __m512i halves, int pieces,
                                                      Store&& store) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000)), half = _mm512_set1_epi32(0x8000);
  const auto bits = [](Vec<float> v) { return _mm512_castps_si512(__m512(v)); };
  const auto subtract = [&](Vec<float>& from, __m512i piece) {
    from -= Vec<float>(_mm512_castsi512_ps(_mm512_and_si512(piece, upper)));
  };
  store(0, _mm512_permutex2var_epi16(bits(a), halves, bits(b)));
  if (pieces == 1) return;
  subtract(a, bits(a)), subtract(b, bits(b));
  const __m512i second_a = _mm512_add_epi32(bits(a), half), second_b = _mm512_add_epi32(bits(b), half);
  store(1, _mm512_permutex2var_epi16(second_a, halves, second_b));
  if (pieces == 2) return;
  subtract(a, second_a), subtract(b, second_b);
  store(2, _mm512_permutex2var_epi16(bits(a), halves, bits(b)));
}

// Columns [i, i + 32) of a row, as far as there are columns, as pairs at to + i/2, with zeros
// beyond
template <class T>
inline void split_columns(const T* from, int64_t i, int64_t columns, int pieces, float* to, int64_t piece) {
  const Vec<float> a = load_some<float>(from + i, columns - i);
  const Vec<float> b = load_some<float>(from + smaller(i + 16, columns), columns - i - 16);
  for_pieces(a, b, halves_in_a_row(), pieces,
             [&](int n, __m512i halves) { _mm512_storeu_si512(to + n * piece + i / 2, halves); });
}

// Two rows of kTile floats as pairs
inline void split_two_rows(const float* first, const float* second, int pieces, float* to, int64_t piece) {
  for (int64_t c = 0; c < kTile<float>; c += kWidth<float>)
    for_pieces(load<float>(first + c), load<float>(second + c), halves_by_turns(), pieces,
               [&](int n, __m512i halves) { _mm512_storeu_si512(to + n * piece + c, halves); });
}

// to[(m*pieces + n)*piece + t] = piece n of the pair from[2t, m], from[2t + 1, m], for
// m = 0 .. columns-1 (at most 16) and t = 0 .. 15, with zeros from row `rows` on
inline void turn_ranks(const bf16* from, int64_t ld, int64_t rows, int64_t columns, int /*pieces: 1*/, float* to,
                       int64_t piece) {
  transpose_pairs(from, ld, rows, columns, to, piece);
}
inline void turn_ranks(const float* from, int64_t ld, int64_t rows, int64_t columns, int pieces, float* to,
                       int64_t piece) {
  alignas(64) float turned[2][16][16];
  transpose_some<float>(from, ld, columns, rows, turned[0][0], 16);
  transpose_some<float>(rows > 16 ? from + 16 * ld : from, ld, columns, rows - 16, turned[1][0], 16);
  for (int64_t m = 0; m < columns; m++)
    for_pieces(load<float>(turned[0][m]), load<float>(turned[1][m]), halves_in_a_row(), pieces,
               [&](int n, __m512i halves) { _mm512_storeu_si512(to + (m * pieces + n) * piece, halves); });
}

// As pack_panel(): [rows/2, columns] pairs for each piece, and rows of zeros up to a multiple of
// Tiles::kDepth
inline Panel<float> pack_pieces(const Param& param, int64_t offset, int64_t rows, int64_t columns, int pieces,
                                float* to) {
  constexpr int64_t kSlab = kStepTerms, ld = kTile<float>;
  const int64_t piece = round_up(rows, kSlab) / 2 * ld;
  alignas(64) float slab[kSlab * ld];
  for_dtype<float>(param.dtype, [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    const P* from = static_cast<const P*>(param.data) + offset;
    float* at = to;
    for (int64_t c = 0; c < columns; c += ld, at += pieces * piece)
      for (int64_t i = 0; i < rows; i += kSlab) {
        const int64_t count = smaller(kSlab, rows - i);
        pack_tile<float>(from + i * param.row_stride + c * param.column_stride, param, count, smaller(ld, columns - c),
                         slab);
        for (int64_t o = count * ld; o < round_up(count, 2) * ld; o++) slab[o] = 0.0f;
        float* pair = at + i / 2 * ld;
        for (int64_t m = 0; m < count; m += 2, pair += ld)
          split_two_rows(slab + m * ld, slab + (m + 1) * ld, pieces, pair, piece);
        for (int n = 0; n < pieces; n++)
          for (int64_t o = 0; o < (Tiles::kDepth - ceil_div(count, 2)) * ld; o++) pair[n * piece + o] = 0.0f;
      }
  });
  return {to, pieces * piece, ld, piece, pieces};
}
#endif

// Ranks in pieces: of a token those of `blocks` blocks, then the general ones, each with zeros up
// to a whole step
struct RankPieces {
  int64_t blocks, r, h;
  int pieces;
  int64_t block, row, token;  // floats from block to block, from piece to piece, from token to token
  RankPieces(int64_t blocks, int64_t r, int64_t h, int pieces)
      : blocks(blocks),
        r(r),
        h(h),
        pieces(pieces),
        block(round_up(r, kStepTerms) / 2),
        row(blocks * block + round_up(h, kStepTerms) / 2),
        token(pieces * row) {}

  // u: of the blocks, general: the others, both of `count` tokens, ld from one to the next
  template <class Rank>
  void split(const Rank* u, const Rank* general, int64_t ld, int64_t count, float* to) const {
    for (int64_t m = 0; m < count; m++, u += ld, general += ld, to += token) {
      for (int64_t j = 0; j < blocks; j++)
        for (int64_t c = 0; c < r; c += kStepTerms) split_columns(u + j * r, c, r, pieces, to + j * block, row);
      for (int64_t c = 0; c < h; c += kStepTerms) split_columns(general, c, h, pieces, to + blocks * block, row);
    }
  }

  // A single block is whichever is asked for
  Ranks<float> of(const float* from) const {
    return {{from, token, row, pieces}, blocks == 1 ? 0 : block, blocks * block, block, row - blocks * block};
  }
};

// What a product takes: for_dtype() of an activation, groups of its rows, and read_panel() with at
// most so many pieces
template <class Product, class Acc, class F>
void for_dtype_of(DType dtype, F&& f) {
  if constexpr (Product::kTerms == 1)
    for_dtype<Acc>(dtype, f);
  else
    f(static_cast<bf16*>(nullptr));
}

template <class Product, class F>
inline __attribute__((always_inline)) void for_groups(int64_t rows, F&& f) {
  constexpr int most = Product::kRows;
  if constexpr (kByTiles<Product>) {
    int64_t m = 0;
    for (; m + most <= rows; m += most) f(UpTo<most, true>{most}, m);
    if (m < rows) f(UpTo<most, false>{int(rows - m)}, m);
  } else {
    for_row_groups(rows, f);
  }
}

template <class Product, class Acc>
Panel<Acc> read_panel_for(const Param& param, int64_t block, int64_t row0, int64_t rows, int64_t column0,
                          int64_t columns, int64_t uses, [[maybe_unused]] int most_pieces, Acc* scratch) {
  [[maybe_unused]] const int64_t offset =
      block * param.block_stride + row0 * param.row_stride + column0 * param.column_stride;
  if constexpr (kByTiles<Product>) {
    const int pieces = int(smaller(pieces_of(param.dtype), most_pieces));
    if (!has_pairs(param, rows)) return pack_pieces(param, offset, rows, columns, pieces, scratch);
  }
  if constexpr (Product::kTerms == 1)
    return read_panel<Acc>(param, block, row0, rows, column0, columns, uses, scratch);
  else
    return pack_pairs(param, offset, rows, columns, Product::kDepth, scratch);
}

// Elements of its scratch
template <class Product, class Acc>
int64_t panel_size_for(DType dtype, int64_t rows, int64_t columns) {
  if (!kByTiles<Product>) return panel_size<Acc>(rows, columns);
  return pieces_of(dtype) * panel_size<Acc>(round_up(rows, kStepTerms) / 2, columns);
}

}  // namespace gralora::cpu::GRALORA_ISA
