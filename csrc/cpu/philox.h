// Dropout: the keep mask of element e of x (row-major) is word e % 4 of Philox-4x32-10(counter = e / 4, key = seed).
// Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "../gralora.h"
#include "microkernel.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int kPhiloxLanes = 16;  // counters taken at once, so that the rounds become vector code

inline void philox_4x32_10(uint64_t seed, uint64_t first_counter, uint32_t (&words)[4][kPhiloxLanes]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0[kPhiloxLanes], c1[kPhiloxLanes], c2[kPhiloxLanes], c3[kPhiloxLanes];
  for (int i = 0; i < kPhiloxLanes; i++) {
    c0[i] = uint32_t(first_counter + i), c1[i] = uint32_t((first_counter + i) >> 32), c2[i] = 0, c3[i] = 0;
  }
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < kPhiloxLanes; i++) {
      const uint64_t even = uint64_t(0xD2511F53u) * c0[i], odd = uint64_t(0xCD9E8D57u) * c2[i];
      c0[i] = uint32_t(odd >> 32) ^ c1[i] ^ k0, c1[i] = uint32_t(odd);
      c2[i] = uint32_t(even >> 32) ^ c3[i] ^ k1, c3[i] = uint32_t(even);
    }
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kPhiloxLanes; i++) {
    words[0][i] = c0[i], words[1][i] = c1[i], words[2][i] = c2[i], words[3][i] = c3[i];
  }
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
    // round half to even, as the reference does; the default rounding mode of the conversion instruction
    const double scaled = __builtin_nearbyint(d.p * 4294967296.0);
    threshold = scaled >= 4294967295.0 ? 0xffffffffu : uint32_t(scaled);
    keep_scale = 1.0 / (1.0 - d.p);
  }

  // factor[i] = 1/(1-p) where element first + i is kept, else 0
  template <class Acc>
  void factors(uint64_t first, int64_t count, Acc* factor) const {
    constexpr int64_t block = 4 * kPhiloxLanes;
    const uint64_t aligned = first & ~uint64_t(3);
    const int64_t lead = int64_t(first - aligned);
    for (int64_t done = 0; done < lead + count; done += block) {
      uint32_t words[4][kPhiloxLanes];
      philox_4x32_10(seed, (aligned + uint64_t(done)) / 4, words);
      Acc values[block];
      for (int lane = 0; lane < kPhiloxLanes; lane++)
        for (int w = 0; w < 4; w++) values[4 * lane + w] = words[w][lane] >= threshold ? Acc(keep_scale) : Acc(0);
      const int64_t from = larger(0, lead - done), to = smaller(block, lead + count - done);
      for (int64_t i = from; i < to; i++) factor[done + i - lead] = values[i];
    }
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
