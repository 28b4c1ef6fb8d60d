// SPDX-License-Identifier: Apache-2.0
// Pairs of bf16: where a processor has AVX512-BF16, two terms of a sum are multiplied in one step,
// at the rate of one in float, and summed in float. An element of the microkernel's `a` and `b` is
// then a pair, in the 32 bits of a float.
//
//   x, g and the ranks as the left factor      pairs as they lie in a row
//   a parameter as the right factor            two rows, interleaved; where its columns lie in one run instead, pairs as they
//                                              lie, transposed like floats
//   x, g and the ranks in a sum over tokens    two rows, interleaved
//
// Dropout leaves elements of x as they are or makes them zeros; their factor 1/(1-p) is that of the
// sums.
//
// Ranks are sums in float. Where all tensors are bf16, U is kept rounded for backward, and U and dH
// are rounded as factors; U of y from kTokensToRound tokens on (below, reading the parameters is
// what costs). PEFT rounds them too, and the path besides. In one more piece, to keep float's
// accuracy, they would cost as much as in float, but by tiles (pieces.h).
#pragma once

#include "panels.h"
#include "tiles.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int64_t kTokensToRound = 5;

inline bool even(int64_t n) { return n % 2 == 0; }
inline bool aligned_to_pairs(const void* data) { return reinterpret_cast<uintptr_t>(data) % sizeof(float) == 0; }

// Whether pairs of columns of x can be read as they lie
inline bool has_pairs(const Rows& x) {
  return x.dtype == DType::bf16 && evenly_spaced(x) && aligned_to_pairs(x.data) &&
         (x.leading_dims == 0 || even(x.strides[0]));
}

inline Source<float> pairs_in_place(const Rows& x, int64_t t, int64_t i) {
  const Source<bf16> rows = in_place<bf16>(x, t, i);
  return {reinterpret_cast<const float*>(rows.data), rows.ld / 2};
}

// Whether `rows` rows of each block of a parameter are pairs
inline bool has_pairs(const Param& param, int64_t rows) {
  return param.dtype == DType::bf16 && even(rows) &&
         (param.column_stride == 1 || (param.row_stride == 1 && even(param.column_stride) && even(param.block_stride) &&
                                       aligned_to_pairs(param.data)));
}

#if defined(__AVX512F__)
template <class Acc>
constexpr bool kMultipliesPairs = sizeof(Acc) == sizeof(float);

// sum + a0*b0 + a1*b1 in each lane. Subnormal numbers count as zero, as in torch's own products of
// bf16. The sum is passed by value: an element of an array in an asm statement stays in memory.
struct Pairs {
  static constexpr int kTerms = 2, kRows = kMaxRows, kDepth = 1;
  struct Scope {};
  static bool available() { return kPairsAreQuicker; }
  static inline __attribute__((always_inline)) Vec<float> add(Vec<float> sum, float a, Vec<float> b) {
    const Vec<float> pair = Vec<float>(_mm512_set1_ps(a));
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(pair));
    return sum;
  }
};

// Indices that bring number i of one vector and number i of another into lane i, for i = 0 .. 15
inline __m512i interleaving() {
  alignas(64) static const uint16_t kLanes[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_load_si512(kLanes);
}

inline __mmask32 first_columns(int64_t count) { return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1; }

// The elements i .. i+31 of those that a mask keeps
inline __mmask32 kept_columns(const uint8_t* kept, int64_t i) {
  uint32_t some;
  memcpy(&some, kept + i / 8, sizeof some);
  return some;
}

// Lane i of `to` (two vectors): the pair first[i], second[i], with zeros for those of the 32
// columns that are not among `some` of a row
inline __attribute__((always_inline)) void interleave(const bf16* first, __mmask32 some_first, const bf16* second,
                                                      __mmask32 some_second, float* to) {
  const __m512i low = interleaving(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i a = _mm512_maskz_loadu_epi16(some_first, first);
  const __m512i b = _mm512_maskz_loadu_epi16(some_second, second);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
}

// The same of the first `columns` of two rows, at most 32; no second row: zeros
inline void interleave_two_rows(const bf16* first, const bf16* second, int64_t columns, float* to) {
  const __mmask32 some = first_columns(columns);
  interleave(first, some, second, second == nullptr ? 0 : some, to);
}

// Columns [begin, end) of `rows` rows, as far as there are columns, two and two as a row of a block
// of pairs; begin and end are multiples of 32 or the last column. Where rows are odd, the last one
// is paired with zeros. kept: of the rows' mask, or null
inline __attribute__((always_inline)) void interleave_rows(Source<bf16> from, int64_t rows, int64_t begin, int64_t end,
                                                           int64_t columns, const uint8_t* kept, float* to) {
  for (int64_t i = begin; i < smaller(end, columns); i += 32)
    for (int64_t m = 0; m < rows; m += 2) {
      const bf16* row = from.data + m * from.ld + i;
      __mmask32 first = first_columns(columns - i), second = m + 1 < rows ? first : 0;
      if (kept != nullptr) {
        first &= kept_columns(kept + m * kKept, i);
        if (second != 0) second &= kept_columns(kept + (m + 1) * kKept, i);
      }
      interleave(row, first, m + 1 < rows ? row + from.ld : row, second, to + m / 2 * kRow<float> + i);
    }
}

inline void copy_kept(const bf16* from, int64_t columns, const uint8_t* kept, float* to) {
  int64_t i = 0;
  for (; i + 32 <= columns; i += 32)
    _mm512_storeu_si512(to + i / 2, _mm512_maskz_loadu_epi16(kept_columns(kept, i), from + i));
  if (i < columns) {
    const __mmask32 some = first_columns(columns - i) & kept_columns(kept, i);
    _mm512_storeu_si512(to + i / 2, _mm512_maskz_loadu_epi16(some, from + i));
  }
}

// Columns of x's rows with zeros where they are dropped, as rows of pairs in `block`
inline Source<float> dropped_pairs(const Rows& x, int64_t t0, int64_t count, int64_t column, int64_t columns,
                                   int64_t width, const Mask& mask, const Block<float>& block) {
  const Source<bf16> from = in_place<bf16>(x, t0, column);
  with_masks(mask, t0, count, column, columns, width, block, [&](int64_t m, const uint8_t* kept) {
    copy_kept(from.data + m * from.ld, columns, kept, block.rows + m * kRow<float>);
  });
  return {block.rows, kRow<float>};
}

// to[m] = the pair first[m], second[m], for m = 0 .. count-1 (at most 16); no second row: zeros
inline __attribute__((always_inline)) void pair_two_rows(const bf16* first, const bf16* second, int count, float* to) {
  const __mmask32 some = (__mmask32(1) << count) - 1;
  const __m512i a = _mm512_maskz_loadu_epi16(some, first);
  const __m512i b = _mm512_maskz_loadu_epi16(second == nullptr ? 0 : some, second);
  _mm512_mask_storeu_epi32(to, __mmask16(some), _mm512_permutex2var_epi16(a, interleaving(), b));
}

// to[m*ldto + t] = the pair from[2t, m], from[2t + 1, m], for m = 0 .. columns-1 (at most 16) and
// t = 0 .. 15, with zeros from row `rows` on
inline void transpose_pairs(const bf16* from, int64_t ld, int64_t rows, int64_t columns, float* to, int64_t ldto) {
  alignas(64) float pairs[16][16], turned[16][16];
  const __mmask32 some = first_columns(columns);
  const __m512i lanes = interleaving();
  for (int64_t t = 0; t < 16; t++) {
    const bool one = 2 * t < rows, two = 2 * t + 1 < rows;
    const __m512i a = _mm512_maskz_loadu_epi16(one ? some : 0, one ? from + 2 * t * ld : from);
    const __m512i b = _mm512_maskz_loadu_epi16(two ? some : 0, two ? from + (2 * t + 1) * ld : from);
    _mm512_store_si512(pairs[t], _mm512_permutex2var_epi16(a, lanes, b));
  }
  transpose_block<float>(pairs[0], 16, turned[0], 16);
  for (int64_t m = 0; m < columns; m++) store<float>(to + m * ldto, load<float>(turned[m]));
}

// As pack_panel(): pairs of rows, the last one with zeros where rows are odd, and rows of zeros up
// to a multiple of `depth`
inline Panel<float> pack_pairs(const Param& param, int64_t offset, int64_t rows, int64_t columns, int depth,
                               float* to) {
  const bf16* from = static_cast<const bf16*>(param.data) + offset;
  const int64_t pairs = ceil_div(rows, 2), tile = round_up(pairs, depth) * kTile<float>;
  Param as_floats = param;
  as_floats.dtype = DType::f32, as_floats.column_stride /= 2;
  float* at = to;
  for (int64_t c = 0; c < columns; c += kTile<float>, at += tile) {
    if (param.column_stride == 1) {
      for (int64_t i = 0; i < pairs; i++) {
        const bf16* pair = from + 2 * i * param.row_stride + c;
        prefetch(address(pair, 24 * param.row_stride));
        interleave_two_rows(pair, 2 * i + 1 < rows ? pair + param.row_stride : nullptr, columns - c,
                            at + i * kTile<float>);
      }
    } else {
      const float* block = reinterpret_cast<const float*>(from) + c * as_floats.column_stride;
      pack_tile<float>(block, as_floats, pairs, smaller(kTile<float>, columns - c), at);
    }
    for (int64_t i = pairs * kTile<float>; i < tile; i++) at[i] = 0.0f;
  }
  return {to, tile, kTile<float>};
}
#else
template <class Acc>
constexpr bool kMultipliesPairs = false;
struct Pairs;
#endif

}  // namespace gralora::cpu::GRALORA_ISA
