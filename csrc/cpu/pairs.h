// Products of pairs of bf16: where a processor has AVX512-BF16, x and a parameter of bf16 are multiplied two columns at a time,
// at the rate of one column in float, and summed in float.
//
//   acc[m][v] += sum_p a[m][2p] * P[2p][...] + a[m][2p+1] * P[2p+1][...]       p = 0 .. count-1, in this order
//
// A panel holds rows of P two by two: a tile is [rows/2, kTile] lanes of a pair each.
#pragma once

#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {

#if defined(__AVX512F__)
template <class Acc>
constexpr bool kMultipliesPairs = sizeof(Acc) == sizeof(float);
inline bool has_pair_products() { return kHasBf16Instructions; }

// sum + a0*b0 + a1*b1 in each lane, whose 32 bits of a and b are a pair of bf16. Subnormal numbers count as zero, as in torch's
// own products of bf16. The sum is passed by value: an element of an array in an asm statement stays in memory.
inline __attribute__((always_inline)) Vec<float> add_pair_products(Vec<float> sum, Vec<float> a, Vec<float> b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
  return sum;
}

inline __attribute__((always_inline)) Vec<float> broadcast_pair(const bf16* pair) {
  float bits;
  memcpy(&bits, pair, sizeof bits);
  return Vec<float>(_mm512_set1_ps(bits));
}

// Lane i of `to` (two vectors): the pair first[i], second[i] for the first `count` of 32 columns, and zeros
inline void interleave_pairs(const bf16* first, const bf16* second, int64_t count, float* to) {
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __mmask32 some = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i a = _mm512_maskz_loadu_epi16(some, first), b = _mm512_maskz_loadu_epi16(some, second);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
}
#else
template <class Acc>
constexpr bool kMultipliesPairs = false;
inline bool has_pair_products() { return false; }
#endif

// Rows row0.. of block b of a parameter whose rows lie in one run; `rows` is even. `to` holds panel_size(rows/2, columns).
template <class Acc>
Panel<Acc> pack_pairs(const Param& param, int64_t b, int64_t row0, int64_t rows, int64_t columns, Acc* to) {
  const bf16* from = static_cast<const bf16*>(param.data) + b * param.block_stride + row0 * param.row_stride;
  Acc* at = to;
  for (int64_t c = 0; c < columns; c += kTile<Acc>)
    for (int64_t i = 0; i < rows; i += 2, at += kTile<Acc>) {
      const bf16* pair = from + i * param.row_stride + c;
      __builtin_prefetch(pair + 24 * param.row_stride);
      interleave_pairs(pair, pair + param.row_stride, smaller(kTile<Acc>, columns - c), at);
    }
  return {to, rows / 2 * kTile<Acc>, kTile<Acc>};
}

// As multiply_rows() on a tile of such a panel; each(column) is called every kSteps pairs.
template <class Acc, int MR, int NV, class Each>
inline __attribute__((always_inline)) void multiply_pairs(int64_t count, Source<bf16> a, const Acc* b,
                                                          Vec<Acc> (&acc)[MR][NV], Each&& each) {
  TensorRows<bf16, MR> rows(a.data, a.ld);
  for (int64_t p0 = 0; p0 < count; p0 += kSteps) {
    each(2 * p0);
    const int64_t end = smaller(p0 + kSteps, count);
#pragma GCC unroll 1
    for (int64_t p = p0; p < end; p++) {
      Vec<Acc> b_row[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) b_row[v] = load<Acc>(b + p * kTile<Acc> + v * kWidth<Acc>);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) {
        const Vec<Acc> pair = broadcast_pair(rows.address(m));
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) acc[m][v] = add_pair_products(acc[m][v], pair, b_row[v]);
      }
      rows.next(), rows.next();
    }
  }
}

}  // namespace gralora::cpu::GRALORA_ISA
