// Dropout: the keep mask of element e of x (row-major) is word e % 4 of Philox-4x32-10(counter = e / 4, key = seed).
// Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "../gralora.h"
#include "microkernel.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int kWords = kVectorBytes / 4;
typedef typename VectorOf<uint32_t, kWords>::type Words;
typedef typename VectorOf<uint64_t, kWords / 2>::type Wide;

// Products of the even 32-bit lanes (the low halves of the 64-bit lanes) with m.
inline Wide multiply_even(Words a, uint32_t m) {
#if defined(__AVX512F__)
  return Wide(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return Wide(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(m)));
#else
  return (bit_cast<Wide>(a) & 0xffffffffu) * m;
#endif
}

// One round's multiplication of kWords lanes: the high and low words of m * a.
inline void multiply_words(Words a, uint32_t m, Words& high, Words& low) {
  constexpr uint64_t low_half = 0xffffffffu;
  const Wide even = multiply_even(a, m), odd = multiply_even(bit_cast<Words>(bit_cast<Wide>(a) >> 32), m);
  high = bit_cast<Words>((even >> 32) | (odd & ~low_half));
  low = bit_cast<Words>((even & low_half) | (odd << 32));
}

// words[p][l] is word l % 4 of counter first + p*G + l/4, with G = kWords/4: in memory, the words of 4*G counters in order.
inline void philox_4x32_10(uint64_t seed, uint64_t first, Words (&words)[4]) {
  constexpr int groups = kWords / 4;
  // Lane 4g + p starts with counter p*G + g: then the 4 x 4 transposition within each 128 bits ends in memory order.
  Words c0, c1, c2{}, c3{};
  for (int lane = 0; lane < kWords; lane++) {
    const uint64_t counter = first + uint64_t(lane % 4 * groups + lane / 4);
    c0[lane] = uint32_t(counter), c1[lane] = uint32_t(counter >> 32);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++) {
    Words high0, low0, high1, low1;
    multiply_words(c0, 0xD2511F53u, high0, low0);
    multiply_words(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  Words low, high, even, odd;  // lane masks of the transposition's four shuffles
  for (int lane = 0; lane < kWords; lane++) {
    const int group = lane & ~3, i = lane & 3;
    low[lane] = uint32_t(group + i / 2 + (i % 2) * kWords), high[lane] = low[lane] + 2;
    even[lane] = uint32_t(group + i % 2 + (i / 2) * kWords), odd[lane] = even[lane] + 2;
  }
  const Words a = __builtin_shuffle(c0, c1, low), b = __builtin_shuffle(c2, c3, low);  // c0 c1 of p = 0, then of p = 1
  const Words c = __builtin_shuffle(c0, c1, high), d = __builtin_shuffle(c2, c3, high);  // likewise p = 2, 3
  words[0] = __builtin_shuffle(a, b, even), words[1] = __builtin_shuffle(a, b, odd);
  words[2] = __builtin_shuffle(c, d, even), words[3] = __builtin_shuffle(c, d, odd);
}

// v * factor, and 0 where the factor is 0, whatever v is: a dropped infinity leaves no trace.
template <class Acc>
inline Vec<Acc> drop(Vec<Acc> v, Vec<Acc> factor) {
  return factor != Vec<Acc>{} ? v * factor : Vec<Acc>{};
}
template <class Acc>
inline Acc drop(Acc v, Acc factor) {
  return factor != Acc(0) ? v * factor : Acc(0);
}

struct Mask {
  bool on = false;
  uint64_t seed = 0;
  uint32_t threshold = 0;
  double keep_scale = 1.0;

  explicit Mask(const Dropout& d) {
    if (d.p <= 0.0) return;
    on = true;
    seed = uint64_t(*d.seed);
    const double scaled = __builtin_nearbyint(d.p * 4294967296.0);  // half to even, as the reference rounds
    threshold = scaled >= 4294967295.0 ? 0xffffffffu : uint32_t(scaled);
    keep_scale = 1.0 / (1.0 - d.p);
  }

  // factor[i] = 1/(1-p) where element first + i is kept, else 0
  template <class Acc>
  void factors(uint64_t first, int64_t count, Acc* factor) const {
    constexpr int64_t block = 4 * kWords;
    const int64_t lead = int64_t(first % 4);  // words of the first counter that belong to elements before
    for (int64_t done = -lead; done < count; done += block) {
      Words words[4];
      philox_4x32_10(seed, (first + uint64_t(done)) / 4, words);
      if (done >= 0 && done + block <= count) {
        for (int p = 0; p < 4; p++) store_factors(words[p], factor + done + p * kWords);
      } else {
        Acc edge[block];
        for (int p = 0; p < 4; p++) store_factors(words[p], edge + p * kWords);
        const int64_t from = larger(0, -done), to = smaller(block, count - done);
        for (int64_t i = from; i < to; i++) factor[done + i] = edge[i];
      }
    }
  }

 private:
  void store_factors(Words words, float* factor) const {
    const Words kept = Words(words >= threshold) & bit_cast<uint32_t>(float(keep_scale));
    memcpy(factor, &kept, sizeof kept);
  }
  void store_factors(Words words, double* factor) const {
    for (int lane = 0; lane < kWords; lane++) factor[lane] = words[lane] >= threshold ? keep_scale : 0.0;
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
