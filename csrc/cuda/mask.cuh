// SPDX-License-Identifier: Apache-2.0
// Dropout: the CPU's mask, bit for bit (cpu/philox.h says how an element's draw of 16 bits comes
// from Philox). Kept elements are scaled by 1/(1-p), which the kernels leave to the factor of
// their sums. The seed stays on the device: a captured graph draws anew where its seed is drawn
// anew.
#pragma once

#include "pieces.cuh"

namespace gralora::cuda {

struct Mask {
  const int64_t* seed;  // nullptr: nothing is dropped
  uint32_t threshold;
  int64_t width;  // of a row of x

  __device__ uint64_t key() const { return uint64_t(load_global(seed)); }

  // Bit i: whether element (t, column + i) is kept, i < 16
  __device__ uint32_t kept(uint64_t key, int64_t t, int64_t column) const {
    const uint64_t first = uint64_t(t) * uint64_t(width) + uint64_t(column);
    const uint32_t bits = of_counter(first / 16, key), shift = uint32_t(first % 16);
    return shift == 0 ? bits : (bits | of_counter(first / 16 + 1, key) << 16) >> shift & 0xffffu;
  }

 private:
  __device__ uint32_t of_counter(uint64_t counter, uint64_t key) const {
    uint32_t c[4] = {uint32_t(counter), uint32_t(counter >> 32), 0, 0};
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
      const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
      c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0, c[1] = uint32_t(p1);
      c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1, c[3] = uint32_t(p0);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int word = i / 4, byte = i % 4 * 8;
      const uint32_t low = c[word ^ 2] ^ (c[word] >> 8 | c[word ^ 1] << 24);
      bits |= uint32_t(((c[word] >> byte & 0xffu) << 8 | (low >> byte & 0xffu)) >= threshold) << i;
    }
    return bits;
  }
};

// Zeros the dropped elements of a tile of `rows` x `columns`, a multiple of 16, in shared memory,
// whose first one is (t0, column0) of x; by all threads of the block.
template <class X>
__device__ __forceinline__ void drop_tile(const Mask& mask, X* tile, int pitch, int rows, int columns, int64_t t0,
                                          int64_t column0, int thread, int threads) {
  const uint64_t key = mask.key();
  for (int i = thread; i < rows * (columns / 16); i += threads) {
    const int m = i / (columns / 16), c = i % (columns / 16) * 16;
    const uint32_t kept = mask.kept(key, t0 + m, column0 + c);
#pragma unroll
    for (int e = 0; e < 16; e++)
      if (!(kept >> e & 1)) tile[m * pitch + c + e] = from_float<X>(0.0f);
  }
}

}  // namespace gralora::cuda
