// SPDX-License-Identifier: Apache-2.0
// How tensor cores add products of bf16 to float32 accumulators: c + sum_i a_i b_i, a block of terms at a time.
//
// The products of a block are exact. They and the accumulator are aligned to the largest exponent among them, cut to some
// fraction bits below it, and added; the sum is cut to float32. Nothing rounds to nearest, so long sums drift towards zero.
// Source: Xie et al., arXiv 2511.10909, whose models were compared bit for bit with the cards; their package mmasim is
// what test_tensor_cores.py compares this file with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace gralora::emulator {

struct TensorCore {
  int fraction_bits;
  int terms;  // of a block
};

// From compute capability 8.0 on
inline TensorCore tensor_core(int capability) { return capability >= 90 ? TensorCore{25, 16} : TensorCore{24, 8}; }

inline double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Subnormal numbers have the least exponent of the normal ones: that of float32 is also that of bf16. As doubles all of
// them are normal.
inline int exponent(double x) {
  constexpr int kLeast = -126;
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return std::max(int(bits >> 52 & 0x7ff) - 1023, kLeast);
}

// What is left of x above the bits below 2^-fraction_bits, in units of that
inline int64_t units(double x, int fraction_bits) { return int64_t(x * power_of_two(fraction_bits)); }

inline float cut_to_float(double x) {
  const int e = exponent(x);
  return static_cast<float>(double(units(x, 23 - e)) * power_of_two(e - 23));
}

inline float not_a_number() {
  const uint32_t bits = 0x7fffffff;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// One block
inline float add_block(const double* a, const double* b, int terms, float c, int fraction_bits) {
  const int of_zero = -108 - fraction_bits;
  const auto of_product = [&](int i) { return a[i] * b[i] == 0.0 ? of_zero : exponent(a[i]) + exponent(b[i]); };
  double plain = c;
  int most = c == 0.0f ? of_zero : exponent(c);
  for (int i = 0; i < terms; i++) {
    plain += a[i] * b[i];
    if (std::isfinite(a[i] * b[i])) most = std::max(most, of_product(i));
  }
  if (std::isnan(plain)) return not_a_number();
  if (std::isinf(plain)) return static_cast<float>(plain);
  int64_t sum = units(c, fraction_bits - most);
  for (int i = 0; i < terms; i++) sum += units(a[i] * b[i], fraction_bits - most);
  return cut_to_float(double(sum) * power_of_two(most - fraction_bits));
}

// K terms
inline float multiply_add(const double* a, const double* b, int K, float c, TensorCore core) {
  for (int i = 0; i < K; i += core.terms)
    c = add_block(a + i, b + i, std::min(core.terms, K - i), c, core.fraction_bits);
  return c;
}

}  // namespace gralora::emulator
