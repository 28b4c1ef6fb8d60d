// Dropout: element e of x (row-major) is kept where its draw, half e % 8 of Philox-4x32-10(counter = e / 8, key = seed),
// is at least round(p * 2^16). The halves of a 32-bit word are counted from the low one, as they lie in memory.
// Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "../gralora.h"
#include "microkernel.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int kLanes = kVectorBytes / 8;  // counters that are worked on together, one per 64-bit lane
typedef typename VectorOf<uint64_t, kLanes>::type Lanes;

// 64-bit products of the low halves of the lanes with m.
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
constexpr int kDraws = 8 * kLanes;  // of one group of kLanes counters

// Bit i of `bits`: whether draw i of a group, which lie in `words` as in memory, is at least `threshold` (below 2^16)
inline void compare_group(const Lanes (&words)[2], uint32_t threshold, uint8_t* bits) {
#if defined(__AVX512F__)
  const __m512i least = _mm512_set1_epi16(int16_t(threshold));
  _store_mask32(reinterpret_cast<__mmask32*>(bits), _mm512_cmpge_epu16_mask(__m512i(words[0]), least));
  _store_mask32(reinterpret_cast<__mmask32*>(bits + 4), _mm512_cmpge_epu16_mask(__m512i(words[1]), least));
#elif defined(__AVX2__)
  const __m256i least = _mm256_set1_epi16(int16_t(threshold)), a = __m256i(words[0]), b = __m256i(words[1]);
  const __m256i both = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(a, least), a),
                                          _mm256_cmpeq_epi16(_mm256_max_epu16(b, least), b));
  const int group = _mm256_movemask_epi8(_mm256_permute4x64_epi64(both, 0xd8));
  memcpy(bits, &group, sizeof group);
#else
  uint16_t draws[kDraws];
  memcpy(draws, words, sizeof draws);
  for (int i = 0; i < kDraws; i += 8) {
    bits[i / 8] = 0;
    for (int bit = 0; bit < 8; bit++) bits[i / 8] |= uint8_t((draws[i + bit] >= threshold) << bit);
  }
#endif
}

// The low words of the lanes of both: a's in the even places, b's in the odd ones
inline Lanes low_words(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return Lanes(_mm512_mask_shuffle_epi32(__m512i(a), 0xaaaa, __m512i(b), _MM_PERM_CCAA));
#else
  return (a & 0xffffffffu) | b << 32;
#endif
}

// Bit i: whether draw i of kStreams groups of counters from `first` on is at least `threshold`; groups are interleaved, since
// one alone waits for its products. Only the low half of a lane counts in c0 .. c3: the high one holds what a product left
// there, which saves the splitting of words. `keys`: both words of each round's key.
template <int kStreams>
inline void philox_4x32_10(const uint64_t (&keys)[kRounds][2], uint64_t first, uint32_t threshold, uint8_t* bits) {
  Lanes c0[kStreams], c1[kStreams], c2[kStreams], c3[kStreams];
  Lanes lane_numbers;
  for (int lane = 0; lane < kLanes; lane++) lane_numbers[lane] = uint64_t(lane);
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; s++) {
    c0[s] = lane_numbers + (first + uint64_t(s * kLanes)), c1[s] = c0[s] >> 32;
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
  Lanes low, high;  // the order in memory: even and odd pairs of words interleaved
  for (int lane = 0; lane < kLanes; lane++) {
    low[lane] = uint64_t(lane / 2 + lane % 2 * kLanes), high[lane] = low[lane] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; s++) {
    const Lanes even = low_words(c0[s], c1[s]), odd = low_words(c2[s], c3[s]);
    const Lanes words[2] = {__builtin_shuffle(even, odd, low), __builtin_shuffle(even, odd, high)};
    compare_group(words, threshold, bits + s * kLanes);  // a counter's draws are a byte
  }
}

// Which elements of a row are kept, as bits: element i is bit i % 8 of byte i / 8.
struct Mask {
  bool on = false, drawn = false;
  uint8_t* whole = nullptr;  // Dropout::kept
  uint64_t keys[kRounds][2] = {};
  uint32_t threshold = 0;
  double keep_scale = 1.0;

  explicit Mask(const Dropout& d) {
    if (d.p <= 0.0) return;
    on = true, drawn = d.drawn && d.kept != nullptr, whole = d.kept;
    uint32_t key[2] = {uint32_t(uint64_t(*d.seed)), uint32_t(uint64_t(*d.seed) >> 32)};
    for (int round = 0; round < kRounds; round++) {
      keys[round][0] = key[0], keys[round][1] = key[1];
      key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    threshold = uint32_t(__builtin_nearbyint(d.p * 65536.0));  // half to even, as the reference rounds
    keep_scale = 1.0 / (1.0 - d.p);
  }

  static constexpr int64_t size(int64_t count) { return count / 8 + 32; }  // bytes that draw() may write

  // Bit i of `to`: whether element i0 + i of row t, of `width` elements, is kept
  void row(int64_t t, int64_t width, int64_t i0, int64_t count, uint8_t* to) const {
    if (drawn)
      copy_bytes(whole + t * (width / 8) + i0 / 8, count / 8, to);
    else
      draw(uint64_t(t * width + i0), count, to);
  }

  // Leaves for backward what row() gave for some rows, `stride` bytes apart; after all of them, since bytes that were written just
  // before cannot be read as whole words at once.
  void keep(int64_t t, int64_t rows, int64_t width, int64_t i0, int64_t count, const uint8_t* bits,
            int64_t stride) const {
    if (whole == nullptr || drawn) return;
    for (int64_t m = 0; m < rows; m++) copy_bytes(bits + m * stride, count / 8, whole + (t + m) * (width / 8) + i0 / 8);
  }

  // Bit i of `to`: whether element first + i of all rows is kept
  void draw(uint64_t first, int64_t count, uint8_t* to) const {
    constexpr int kStreams = 4;
    const int shift = int(first % 8);  // draws of the first counter that belong to elements before
    const int64_t counters = ceil_div(shift + count, 8);
    if (threshold > 0xffff) {
      memset(to, 0, size_t(counters));
      return;
    }
    int64_t done = 0;
    for (; done + kStreams * kLanes <= counters; done += kStreams * kLanes)
      philox_4x32_10<kStreams>(keys, first / 8 + uint64_t(done), threshold, to + done);
    const auto rest = [&](auto streams) {
      philox_4x32_10<streams.value>(keys, first / 8 + uint64_t(done), threshold, to + done);
    };
    switch (ceil_div(counters - done, kLanes)) {
      case 1: rest(Int<1>{}); break;
      case 2: rest(Int<2>{}); break;
      case 3: rest(Int<3>{}); break;
      case 4: rest(Int<4>{}); break;
    }
    for (int64_t byte = 0; shift != 0 && byte < ceil_div(count, 8); byte++)
      to[byte] = uint8_t((to[byte] | to[byte + 1] << 8) >> shift);
  }

  static void copy_bytes(const uint8_t* from, int64_t count, uint8_t* to) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) memcpy(to + i, from + i, 32);
    for (; i < count; i++) to[i] = from[i];
  }

  static bool kept(const uint8_t* bits, int64_t i) { return bits[i / 8] >> i % 8 & 1; }

  // v / (1-p) where the element is kept, else 0, whatever v is: a dropped infinity leaves no trace. Of the elements from i on, a
  // multiple of the width.
  template <class Acc>
  Vec<Acc> drop(Vec<Acc> v, const uint8_t* bits, int64_t i) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(Acc) == sizeof(float)) {
      uint16_t some;
      memcpy(&some, bits + i / 8, sizeof some);
      return Vec<float>(_mm512_maskz_mul_ps(some, __m512(v), _mm512_set1_ps(float(keep_scale))));
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(Acc) == sizeof(float)) {
      const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), some = _mm256_set1_epi32(bits[i / 8]);
      const __m256i all = _mm256_cmpeq_epi32(_mm256_and_si256(some, lanes), lanes);
      return Vec<float>(_mm256_and_ps(_mm256_castsi256_ps(all), __m256(v * float(keep_scale))));
    }
#endif
    for (int lane = 0; lane < kWidth<Acc>; lane++) v[lane] = drop(v[lane], bits, i + lane);
    return v;
  }
  template <class Acc>
  Acc drop(Acc v, const uint8_t* bits, int64_t i) const {
    return kept(bits, i) ? v * Acc(keep_scale) : Acc(0);
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
