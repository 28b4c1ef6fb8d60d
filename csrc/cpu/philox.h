// SPDX-License-Identifier: Apache-2.0
// Dropout: element e of x (row-major) is kept where its draw, a number of 16 bits, is at least
// round(p * 2^16). Let b be the 16 bytes of Philox-4x32-10(counter = e / 16, key = seed), as they
// are in memory, and i = e % 16. The high byte of the draw is b[i], which decides for all but 1 of
// 256 elements. The low byte is b[i ^ 8] ^ b[i'], where i' is i with its low three bits increased
// by one, modulo 8: so any two draws of a counter are independent.
//
// Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "../gralora.h"
#include "microkernel.h"

namespace gralora::cpu::GRALORA_ISA {

// Counters that are computed together, one per 64-bit lane
constexpr int kLanes = kVectorBytes / 8;
typedef typename VectorOf<uint64_t, kLanes>::type Lanes;

// 64-bit products of the low half of each lane with m
inline Lanes multiply_low(Lanes a, uint32_t m) {
#if defined(__AVX512F__)
  return Lanes(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return Lanes(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(m)));
#else
  return (a & 0xffffffffu) * m;
#endif
}

// a ^ b ^ key in all lanes
inline Lanes xor3(Lanes a, Lanes b, uint64_t key) {
#if defined(__AVX512F__)
  return Lanes(_mm512_ternarylogic_epi64(__m512i(a), __m512i(b), _mm512_set1_epi64(int64_t(key)), 0x96));
#else
  return a ^ b ^ key;
#endif
}

constexpr int kRounds = 10;
constexpr int kDraws = 16 * kLanes;  // draws of one group of kLanes counters

// Sets bit i of `bits` to whether draw i is at least `threshold` (below 2^16), for half a group of
// counters, whose bytes are in `bytes` as in memory.
inline void compare_draws(Lanes bytes, uint32_t threshold, uint8_t* bits) {
#if defined(__AVX512BW__)
  const __m512i high = __m512i(bytes), least_high = _mm512_set1_epi8(int8_t(threshold >> 8));
  const __m512i low = _mm512_xor_si512(_mm512_shuffle_epi32(high, _MM_PERM_BADC), _mm512_ror_epi64(high, 8));
  const __mmask64 tied = _mm512_cmpeq_epu8_mask(high, least_high);
  const __mmask64 won = _mm512_mask_cmpge_epu8_mask(tied, low, _mm512_set1_epi8(int8_t(threshold)));
  _store_mask64(reinterpret_cast<__mmask64*>(bits), won | _mm512_cmpgt_epu8_mask(high, least_high));
#elif defined(__AVX2__)
  const __m256i high = __m256i(bytes), least_high = _mm256_set1_epi8(int8_t(threshold >> 8));
  const __m256i turned = _mm256_or_si256(_mm256_srli_epi64(high, 8), _mm256_slli_epi64(high, 56));
  const __m256i low = _mm256_xor_si256(_mm256_shuffle_epi32(high, 0x4e), turned);
  const __m256i won = _mm256_cmpeq_epi8(_mm256_max_epu8(low, _mm256_set1_epi8(int8_t(threshold))), low);
  const __m256i lost = _mm256_andnot_si256(won, _mm256_cmpeq_epi8(high, least_high));
  const __m256i kept = _mm256_andnot_si256(lost, _mm256_cmpeq_epi8(_mm256_max_epu8(high, least_high), high));
  const int draws = _mm256_movemask_epi8(kept);
  memcpy(bits, &draws, sizeof draws);
#else
  uint8_t b[kDraws / 2];
  memcpy(b, &bytes, sizeof b);
  memset(bits, 0, sizeof b / 8);
  for (int i = 0; i < kDraws / 2; i++) {
    const uint32_t low = b[i ^ 8] ^ b[(i & ~7) | ((i + 1) & 7)];
    bits[i / 8] |= uint8_t(((uint32_t(b[i]) << 8 | low) >= threshold) << i % 8);
  }
#endif
}

// The low words of the lanes of a and b, a's as the even words of the result and b's as the odd
// ones
inline Lanes low_words(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return Lanes(_mm512_mask_shuffle_epi32(__m512i(a), 0xaaaa, __m512i(b), _MM_PERM_CCAA));
#else
  return (a & 0xffffffffu) | b << 32;
#endif
}

// A group of kLanes counters, from `first` on
struct Group {
  uint64_t first;
  uint8_t* bits;  // bit i: whether the group's draw i is at least the threshold; 2 * kLanes bytes
};

// Computes several groups at once, since one alone would wait for its products. Only the low half
// of each lane of c0 .. c3 counts: the high half holds the rest of a product, which need not be
// cleared. `keys`: both words of the key of each round.
template <int kStreams>
inline void philox_4x32_10(const uint64_t (&keys)[kRounds][2], const Group* groups, uint32_t threshold) {
  Lanes c0[kStreams], c1[kStreams], c2[kStreams], c3[kStreams];
  Lanes lane_numbers;
  for (int lane = 0; lane < kLanes; lane++) lane_numbers[lane] = uint64_t(lane);
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; s++) {
    c0[s] = lane_numbers + groups[s].first, c1[s] = c0[s] >> 32;
    c2[s] = c3[s] = Lanes{};
  }
#pragma GCC unroll 1
  for (int round = 0; round < kRounds; round++)
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; s++) {
      const Lanes p0 = multiply_low(c0[s], 0xD2511F53u), p1 = multiply_low(c2[s], 0xCD9E8D57u);
      c0[s] = xor3(p1 >> 32, c1[s], keys[round][0]), c1[s] = p1;
      c2[s] = xor3(p0 >> 32, c3[s], keys[round][1]), c3[s] = p0;
    }
  // Restore the order in memory, in which even and odd pairs of words are interleaved
  Lanes low, high;
  for (int lane = 0; lane < kLanes; lane++) {
    low[lane] = uint64_t(lane / 2 + lane % 2 * kLanes), high[lane] = low[lane] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; s++) {
    const Lanes even = low_words(c0[s], c1[s]), odd = low_words(c2[s], c3[s]);
    compare_draws(__builtin_shuffle(even, odd, low), threshold, groups[s].bits);
    compare_draws(__builtin_shuffle(even, odd, high), threshold, groups[s].bits + kLanes);
  }
}

// The dropout mask as bits: bit i % 8 of byte i / 8 tells whether element i of a row is kept.
struct Mask {
  bool on = false, drawn = false;
  uint8_t* saved = nullptr;  // Dropout::kept, the mask of all of x
  uint64_t keys[kRounds][2] = {};
  uint32_t threshold = 0;
  double keep_scale = 1.0;  // 1/(1-p), by which elements that are kept are multiplied

  explicit Mask(const Dropout& d) {
    if (d.p <= 0.0) return;
    on = true, drawn = d.drawn && d.kept != nullptr, saved = d.kept;
    uint32_t key[2] = {uint32_t(uint64_t(*d.seed)), uint32_t(uint64_t(*d.seed) >> 32)};
    for (int round = 0; round < kRounds; round++) {
      keys[round][0] = key[0], keys[round][1] = key[1];
      key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    // Half to even, as the reference rounds
    threshold = uint32_t(__builtin_nearbyint(d.p * 65536.0));
    keep_scale = 1.0 / (1.0 - d.p);
  }

  // Bytes that rows() may write for a row
  static constexpr int64_t size(int64_t count) { return count / 8 + 32; }

  // For m = 0 .. rows-1, sets bit i of to + m * stride to whether element i0 + i of row t + m is
  // kept. A whole row has `width` elements.
  void rows(int64_t t, int64_t rows, int64_t width, int64_t i0, int64_t count, uint8_t* to, int64_t stride) const {
    if (drawn)
      for (int64_t m = 0; m < rows; m++) copy_bytes(saved + (t + m) * (width / 8) + i0 / 8, count / 8, to + m * stride);
    else
      draw(uint64_t(t * width + i0), rows, width, count, to, stride);
  }

  // Saves for backward what rows() gave for some rows, `stride` bytes apart. It is called after
  // the masks of all these rows were used: a wide load of bytes that were written just before, in
  // smaller parts, would have to wait.
  void save(int64_t t, int64_t rows, int64_t width, int64_t i0, int64_t count, const uint8_t* bits,
            int64_t stride) const {
    if (saved == nullptr || drawn) return;
    for (int64_t m = 0; m < rows; m++) copy_bytes(bits + m * stride, count / 8, saved + (t + m) * (width / 8) + i0 / 8);
  }

  static void copy_bytes(const uint8_t* from, int64_t count, uint8_t* to) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) memcpy(to + i, from + i, 32);
    for (; i < count; i++) to[i] = from[i];
  }

  static bool kept(const uint8_t* bits, int64_t i) { return bits[i / 8] >> i % 8 & 1; }

  // v where the element is kept, and 0 elsewhere, whatever v is: a dropped infinity leaves no
  // trace. v holds the elements from i on, a multiple of the width.
  template <class Acc>
  static Vec<Acc> drop(Vec<Acc> v, const uint8_t* bits, int64_t i) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Acc) == sizeof(float)) {
      uint16_t some;
      memcpy(&some, bits + i / 8, sizeof some);
      return Vec<float>(_mm512_maskz_mov_ps(some, __m512(v)));
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(Acc) == sizeof(float)) {
      const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), some = _mm256_set1_epi32(bits[i / 8]);
      const __m256i all = _mm256_cmpeq_epi32(_mm256_and_si256(some, lanes), lanes);
      return Vec<float>(_mm256_and_ps(_mm256_castsi256_ps(all), __m256(v)));
    }
#endif
    for (int lane = 0; lane < kWidth<Acc>; lane++) v[lane] = drop<Acc>(v[lane], bits, i + lane);
    return v;
  }
  template <class Acc>
  static Acc drop(Acc v, const uint8_t* bits, int64_t i) {
    return kept(bits, i) ? v : Acc(0);
  }

 private:
  static constexpr int kGroups = 4;

  // first: the row-major index of the first element of the first row
  void draw(uint64_t first, int64_t rows, int64_t width, int64_t count, uint8_t* to, int64_t stride) const {
    if (threshold > 0xffff) {
      for (int64_t m = 0; m < rows; m++) memset(to + m * stride, 0, size_t(ceil_div(count, 8)));
      return;
    }
    Group groups[kGroups];
    int waiting = 0;
    for (int64_t m = 0; m < rows; m++) {
      const uint64_t element = first + uint64_t(m * width);
      for (int64_t c = 0; c < ceil_div(int64_t(element % 16) + count, 16); c += kLanes) {
        groups[waiting++] = {element / 16 + uint64_t(c), to + m * stride + 2 * c};
        if (waiting == kGroups) philox_4x32_10<kGroups>(keys, groups, threshold), waiting = 0;
      }
    }
    if (waiting > 0) {  // the last groups are fewer, and are filled up with the first of them
      while (waiting < kGroups) groups[waiting++] = groups[0];
      philox_4x32_10<kGroups>(keys, groups, threshold);
    }
    for (int64_t m = 0; m < rows; m++)
      drop_first(to + m * stride, int((first + uint64_t(m * width)) % 16), ceil_div(count, 8));
  }

  // Moves `bytes` bytes down by some bits, which are the draws of a row's first counter for
  // elements before the row.
  static void drop_first(uint8_t* to, int bits, int64_t bytes) {
    const uint8_t* from = to + bits / 8;
    for (int64_t i = 0; i < bytes && bits != 0; i++) to[i] = uint8_t((from[i] | from[i + 1] << 8) >> bits % 8);
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
