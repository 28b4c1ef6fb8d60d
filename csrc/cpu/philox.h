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

// The draws of kStreams groups of counters from `first` on, in order; groups are interleaved, since one alone waits for its
// products. Only the low half of a lane counts in c0 .. c3: the high one holds what a product left there, which saves the
// splitting of words. `keys`: both words of each round's key.
template <int kStreams>
inline void philox_4x32_10(const uint64_t (&keys)[kRounds][2], uint64_t first, uint16_t* draws) {
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
    const Lanes even = (c0[s] & 0xffffffffu) | c1[s] << 32, odd = (c2[s] & 0xffffffffu) | c3[s] << 32;
    const Lanes words[2] = {__builtin_shuffle(even, odd, low), __builtin_shuffle(even, odd, high)};
    memcpy(draws + s * kDraws, words, sizeof words);
  }
}

struct Mask {
  bool on = false;
  uint64_t keys[kRounds][2] = {};
  uint32_t threshold = 0;
  double keep_scale = 1.0;

  explicit Mask(const Dropout& d) {
    if (d.p <= 0.0) return;
    on = true;
    uint32_t key[2] = {uint32_t(uint64_t(*d.seed)), uint32_t(uint64_t(*d.seed) >> 32)};
    for (int round = 0; round < kRounds; round++) {
      keys[round][0] = key[0], keys[round][1] = key[1];
      key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    threshold = uint32_t(__builtin_nearbyint(d.p * 65536.0));  // half to even, as the reference rounds
    keep_scale = 1.0 / (1.0 - d.p);
  }

  // to[i] = the draw of element first + i
  void draw(uint64_t first, int64_t count, uint16_t* to) const {
    constexpr int kStreams = 4;
    int64_t done = -int64_t(first % 8);  // draws of the first counter that belong to elements before
    while (done < count) {
      const uint64_t counter = (first + uint64_t(done)) / 8;
      if (done >= 0 && done + kStreams * kDraws <= count) {
        philox_4x32_10<kStreams>(keys, counter, to + done);
        done += kStreams * kDraws;
      } else if (done >= 0 && done + kDraws <= count) {
        philox_4x32_10<1>(keys, counter, to + done);
        done += kDraws;
      } else {
        uint16_t edge[kDraws];
        philox_4x32_10<1>(keys, counter, edge);
        const int64_t begin = larger(0, -done), end = smaller(kDraws, count - done);
        memcpy(to + done + begin, edge + begin, size_t(end - begin) * sizeof(uint16_t));
        done += kDraws;
      }
    }
  }

  // v / (1-p) where the draw keeps it, else 0, whatever v is: a dropped infinity leaves no trace.
  Vec<float> drop(Vec<float> v, const uint16_t* draws) const {
    typedef typename VectorOf<uint16_t, kWidth<float>>::type Halves;
    typedef typename VectorOf<uint32_t, kWidth<float>>::type Words;
    Halves halves;
    memcpy(&halves, draws, sizeof halves);
    const Words kept = Words(__builtin_convertvector(halves, Words) >= threshold);
    return bit_cast<Vec<float>>(bit_cast<Words>(v * float(keep_scale)) & kept);
  }
  Vec<double> drop(Vec<double> v, const uint16_t* draws) const {
    for (int lane = 0; lane < kWidth<double>; lane++) v[lane] = draws[lane] >= threshold ? v[lane] * keep_scale : 0.0;
    return v;
  }
  template <class Acc>
  Acc drop(Acc v, uint16_t draw) const {
    return draw >= threshold ? v * Acc(keep_scale) : Acc(0);
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
