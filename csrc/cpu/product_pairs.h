// SPDX-License-Identifier: Apache-2.0
// The product of bfloat16 with bfloat16 by AVX512-BF16. One step multiplies two terms of a sum, at
// the rate of one term in float, and sums them in float. An element of a factor is therefore a
// pair of bf16 in the 32 bits of a float.
//
//   x, g and latents, left factor        neighbours in a row are a pair
//   a parameter, right factor            neighbours in a column are a pair: two rows interleaved,
//                                        or, if columns are contiguous, pairs move like floats
//   x, g and latents, sum over tokens    neighbouring tokens are a pair: two rows are interleaved
//
// Latents are rounded to bf16: both U, which backward reads again, and dH. (PEFT rounds them too,
// and all other intermediate results.) Dropout leaves an element of x as it is or makes it zero;
// the factor 1/(1-p) is applied to the sums instead.
#pragma once

#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {

#if defined(__AVX512F__)

// ------------------------------------------------------------------ interleaving

// Indices that bring element i of one vector and element i of another into lane i, for i = 0 .. 15
inline __m512i interleaving() {
  alignas(64) static const uint16_t kLanes[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_load_si512(kLanes);
}

inline __mmask32 first_columns(int64_t count) { return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1; }

// Which of the elements i .. i+31 a mask keeps
inline __mmask32 kept_columns(const uint8_t* mask, int64_t i) {
  uint32_t some;
  memcpy(&some, mask + i / 8, sizeof some);
  return some;
}

// Writes two vectors to `to`, whose lane i is the pair first[i], second[i], i = 0 .. 31. Elements
// that are not among the `some` of their row are zeros, and are not read.
inline __attribute__((always_inline)) void interleave(const bf16* first, __mmask32 some_first, const bf16* second,
                                                      __mmask32 some_second, float* to) {
  const __m512i low = interleaving(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i a = _mm512_maskz_loadu_epi16(some_first, first);
  const __m512i b = _mm512_maskz_loadu_epi16(some_second, second);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
}

// The same for the first `columns` elements, at most 32, of two rows. Without a second row: zeros.
inline void interleave_two_rows(const bf16* first, const bf16* second, int64_t columns, float* to) {
  const __mmask32 some = first_columns(columns);
  interleave(first, some, second, second == nullptr ? 0 : some, to);
}

// to[m] = the pair first[m], second[m], for m = 0 .. count-1, at most 16. Without a second row:
// zeros.
inline __attribute__((always_inline)) void pair_two_rows(const bf16* first, const bf16* second, int count, float* to) {
  const __mmask32 some = (__mmask32(1) << count) - 1;
  const __m512i a = _mm512_maskz_loadu_epi16(some, first);
  const __m512i b = _mm512_maskz_loadu_epi16(second == nullptr ? 0 : some, second);
  _mm512_mask_storeu_epi32(to, __mmask16(some), _mm512_permutex2var_epi16(a, interleaving(), b));
}

// ------------------------------------------------------------------ x and g

inline Source<float> pairs_in_place(const Activation& x, int64_t t, int64_t i) {
  const Source<bf16> rows = in_place<bf16>(x, t, i);
  return {reinterpret_cast<const float*>(rows.data), rows.ld / 2};
}

// Copies a row of x, with zeros for the elements that are dropped.
inline void copy_dropped(const bf16* from, int64_t columns, const uint8_t* mask, float* to) {
  for (int64_t i = 0; i < columns; i += 32) {
    const __mmask32 some = first_columns(columns - i) & kept_columns(mask, i);
    _mm512_storeu_si512(to + i / 2, _mm512_maskz_loadu_epi16(some, from + i));
  }
}

// Makes a row of the buffer from each two tokens of a part; the last one of an odd number is
// paired with zeros. Rows of zeros follow, up to `rows` rows.
inline void interleave_rows(const Part& part, int64_t rows, const RowBuffer<float>& buffer) {
  const Source<bf16> from = in_place<bf16>(part.x, part.t0, part.column);
  if (part.mask.on) part.mask.rows(part.t0, part.tokens, part.width, part.column, part.columns, buffer.mask, kMaskRow);
  for (int64_t i = 0; i < part.columns; i += 32)
    for (int64_t m = 0; m < part.tokens; m += 2) {
      const bf16* row = from.data + m * from.ld + i;
      const bool two = m + 1 < part.tokens;
      __mmask32 first = first_columns(part.columns - i), second = two ? first : 0;
      if (part.mask.on) {
        first &= kept_columns(buffer.mask + m * kMaskRow, i);
        if (two) second &= kept_columns(buffer.mask + (m + 1) * kMaskRow, i);
      }
      interleave(row, first, two ? row + from.ld : row, second, buffer.rows + m / 2 * kBufferRow<float> + i);
    }
  for (int64_t m = ceil_div(part.tokens, 2); m < rows; m++)
    memset(buffer.rows + m * kBufferRow<float>, 0, size_t(round_up(part.columns, kNR<float>)) * sizeof(float));
}

// ------------------------------------------------------------------ parameters

// Packs a block as pack_panel() does, but each two rows as one row of pairs; the last one of an
// odd number is paired with zeros. Rows of zeros follow, up to a multiple of `depth` rows of
// pairs.
inline Panel<float> pack_pairs(const BlockOf& b, int depth, float* to) {
  const Param& param = b.param;
  const bf16* from = static_cast<const bf16*>(param.data) + b.offset();
  const int64_t pairs = ceil_div(b.rows, 2), micro_panel = round_up(pairs, depth) * kNR<float>;
  Param as_floats = param;
  as_floats.dtype = DType::f32, as_floats.column_stride /= 2;
  float* at = to;
  for (int64_t c = 0; c < b.columns; c += kNR<float>, at += micro_panel) {
    if (param.column_stride == 1) {
      for (int64_t i = 0; i < pairs; i++) {
        const bf16* pair = from + 2 * i * param.row_stride + c;
        prefetch(address(pair, 24 * param.row_stride));
        interleave_two_rows(pair, 2 * i + 1 < b.rows ? pair + param.row_stride : nullptr, b.columns - c,
                            at + i * kNR<float>);
      }
    } else {
      const float* block = reinterpret_cast<const float*>(from) + c * as_floats.column_stride;
      pack_micro_panel<float>(block, as_floats, pairs, smaller(kNR<float>, b.columns - c), at);
    }
    for (int64_t i = pairs * kNR<float>; i < micro_panel; i++) at[i] = 0.0f;
  }
  return {to, micro_panel, kNR<float>};
}

// ------------------------------------------------------------------ the product

// What this product shares with the product by AMX, which reads the same pairs. The right factor
// has a multiple of `kDepth` rows of pairs.
template <int kDepth>
struct PairedRows {
  using Acc = float;
  static constexpr int kTerms = 2;
  template <class F>
  static void for_dtype(DType, F&& f) {
    f(static_cast<bf16*>(nullptr));
  }
  static int64_t steps(int64_t terms) { return round_up(ceil_div(terms, 2), kDepth); }

  static Source<float> left_rows(Reading reading, const Part& part, const RowBuffer<float>& buffer) {
    if (reading == Reading::InPlace) return pairs_in_place(part.x, part.t0, part.column);
    const Source<bf16> from = in_place<bf16>(part.x, part.t0, part.column);
    with_masks(part, buffer, [&](int64_t m, const uint8_t* mask) {
      copy_dropped(from.data + m * from.ld, part.columns, mask, buffer.rows + m * kBufferRow<float>);
    });
    return {buffer.rows, kBufferRow<float>};
  }
  static Source<float> right_rows(Reading, const Part& part, const RowBuffer<float>& buffer) {
    interleave_rows(part, steps(part.tokens), buffer);
    return {buffer.rows, kBufferRow<float>};
  }
  static Source<float> left_of(const Source<float>&, const Part& part) {
    return pairs_in_place(part.x, part.t0, part.column);
  }
};

struct Pairs : PairedRows<1>, VectorProduct<float> {
  using Latent = bf16;

  // sum + a0*b0 + a1*b1 in each lane. Subnormal numbers count as zero, as they do in torch's own
  // products of bf16. The sum is passed by value, since GCC holds an element of an array in memory
  // where an asm statement uses it.
  static inline __attribute__((always_inline)) Vec<float> add(Vec<float> sum, float a, Vec<float> b) {
    const Vec<float> pair = Vec<float>(_mm512_set1_ps(a));
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(pair));
    return sum;
  }
  template <class Group, int NV>
  using Sums = VectorSums<Pairs, float, Group, NV>;

  static int64_t panel_size(DType, int64_t rows, int64_t columns) {
    return GRALORA_ISA::panel_size<float>(steps(rows), columns);
  }
  static Panel<float> read_panel(Packing, const BlockOf& block, int /*pieces*/, float* scratch) {
    return pack_pairs(block, 1, scratch);
  }

  static int64_t latents_size(const Shape&, int64_t) { return 0; }
  static Latents<float> read_latents(const Shape& s, const bf16* u, int64_t block, int64_t, float*) {
    const int64_t ld = (s.k * s.r + s.h) / 2;
    const float* pairs = reinterpret_cast<const float*>(u);
    return {{pairs + block * s.r / 2, ld}, {pairs + s.k * s.r / 2, ld}};
  }

  // Packs pairs of tokens into left micro-panels of MR ranks. With c the first rank of a group,
  // element c*steps(tokens) + t*MR + m of `to` is the pair v[2t, c + m], v[2t + 1, c + m].
  static int64_t packed_latents_size(int64_t ranks, int64_t tokens) { return ranks * steps(tokens); }
  static void pack_latents(const bf16* v, int64_t ld, int64_t ranks, int64_t tokens, float* to) {
    for_row_groups(ranks, [&](auto group, int64_t c) {
      constexpr int MR = decltype(group)::value;
      float* at = to + c * steps(tokens);
      for (int64_t t = 0; t < tokens; t += 2, at += MR)
        pair_two_rows(v + t * ld + c, t + 1 < tokens ? v + (t + 1) * ld + c : nullptr, MR, at);
    });
  }
  template <class Group>
  static inline __attribute__((always_inline)) auto packed(Group, const float* latents, int64_t tokens, int64_t c,
                                                           int64_t first) {
    return LeftPacked<float, Group::value>{latents + c * steps(tokens) + first / 2 * Group::value};
  }
};

#endif

}  // namespace gralora::cpu::GRALORA_ISA
