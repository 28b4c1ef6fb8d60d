// SPDX-License-Identifier: Apache-2.0
// Split-bf16: floats as sums of bf16 pieces. Where activations are bf16 but parameters and latents
// are not, AMX multiplies by each piece and adds the products. It makes sixteen products of bf16
// in the time of one of floats.
//
//   f = f0 + f1 + f2
//   f0: the upper 8 bits of f's significand; f1: f - f0, rounded to 8 bits; f2: f - f0 - f1
//
// Three pieces give f exactly (down to 2^-133); a float16 is the sum of two. U and the gradients
// of parameters are computed with all pieces, and are as exact as sums of floats. y and dx are
// rounded to bf16, so that two pieces of each factor suffice: their error is below 2^-16. An
// infinity has no second piece, and its products become NaN.
//
// Activations in float would need six products, and were slower than the product in float
// (benchmarks/results/NOTES.md).
#pragma once

#include "product_pairs.h"

namespace gralora::cpu::GRALORA_ISA {

inline int pieces_of(DType dtype) { return dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : 3; }

#if defined(__AVX512F__)

// Indices of the upper halves of the lanes of two vectors a and b: those of a and then those of b,
// or alternately one of a and one of b
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

// Calls store(i, numbers) for each piece i of a and b, with its bf16 numbers in the order of
// `halves`. Where there is only one piece, a and b were bf16 before. The first piece is cut, not
// rounded: rounding could make it infinite.
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

// Splits a row into pairs, with zeros up to a multiple of 32 columns. Its pieces are `piece`
// floats apart.
template <class T>
inline void split_row(const T* from, int64_t columns, int pieces, float* to, int64_t piece) {
  for (int64_t i = 0; i < columns; i += 32) {
    const Vec<float> a = load_some<float>(from + i, columns - i);
    const Vec<float> b = load_some<float>(from + smaller(i + 16, columns), columns - i - 16);
    for_pieces(a, b, halves_in_a_row(), pieces,
               [&](int n, __m512i halves) { _mm512_storeu_si512(to + n * piece + i / 2, halves); });
  }
}

// Splits two rows of kNR floats, interleaved into pairs.
inline void split_two_rows(const float* first, const float* second, int pieces, float* to, int64_t piece) {
  for (int64_t c = 0; c < kNR<float>; c += kWidth<float>)
    for_pieces(load<float>(first + c), load<float>(second + c), halves_by_turns(), pieces,
               [&](int n, __m512i halves) { _mm512_storeu_si512(to + n * piece + c, halves); });
}

// Splits columns, each of which becomes a row: to[(m*pieces + n)*piece + t] = piece n of the pair
// from[2t, m], from[2t + 1, m], for m = 0 .. columns-1 (at most 16) and t = 0 .. 15, with zeros
// from row `rows` on.
template <class T>
inline void split_transposed(const T* from, int64_t ld, int64_t rows, int64_t columns, int pieces, float* to,
                             int64_t piece) {
  alignas(64) float turned[2][16][16];
  transpose_some<float>(from, ld, columns, rows, turned[0][0], 16);
  transpose_some<float>(rows > 16 ? from + 16 * ld : from, ld, columns, rows - 16, turned[1][0], 16);
  for (int64_t m = 0; m < columns; m++)
    for_pieces(load<float>(turned[0][m]), load<float>(turned[1][m]), halves_in_a_row(), pieces,
               [&](int n, __m512i halves) { _mm512_storeu_si512(to + (m * pieces + n) * piece, halves); });
}

// Packs a block as pack_panel() does, but each micro-panel as [rows/2, kNR] pairs for each piece.
// Rows of zeros follow, up to a multiple of 32 rows. A slab is 32 rows of a micro-panel before
// they are split.
inline Panel<float> pack_pieces(const BlockOf& b, int pieces, float* to) {
  constexpr int64_t kSlab = 32, ld = kNR<float>;
  const Param& param = b.param;
  const int64_t piece = round_up(b.rows, kSlab) / 2 * ld;
  for_dtype<float>(param.dtype, [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    const P* from = static_cast<const P*>(param.data) + b.offset();
    float* at = to;
    for (int64_t c = 0; c < b.columns; c += ld, at += pieces * piece)
      for (int64_t i = 0; i < b.rows; i += kSlab) {
        alignas(64) float slab[kSlab * ld];
        const int64_t rows = smaller(kSlab, b.rows - i);
        pack_micro_panel<float>(from + i * param.row_stride + c * param.column_stride, param, rows,
                                smaller(ld, b.columns - c), slab);
        memset(slab + rows * ld, 0, size_t((kSlab - rows) * ld) * sizeof(float));
        for (int64_t m = 0; m < kSlab; m += 2)
          split_two_rows(slab + m * ld, slab + (m + 1) * ld, pieces, at + (i + m) / 2 * ld, piece);
      }
  });
  return {to, pieces * piece, ld, piece, pieces};
}

#endif

}  // namespace gralora::cpu::GRALORA_ISA
