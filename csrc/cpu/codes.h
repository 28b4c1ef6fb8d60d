// SPDX-License-Identifier: Apache-2.0
// The codes of a merge (coded_merge.cpp), row by row, and the checksum by which a weight is known
// again.
//
//   code = position of W - position of V        in units of the last place
//
// The position of a number is its index among all numbers of its dtype in rising order. kZero
// stands for a weight of +0, from which V is far in units of the last place, and kListed for a
// weight in the list of exceptions, since its code does not fit or V is NaN.
#pragma once

#include "microkernel.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int8_t kZero = 127, kListed = -128;
constexpr int kMostUnits = 126;

// The bits of a number as an unsigned one, and the type by which they may be read in its place
template <class U>
struct Bits {
  typedef U type;
  typedef U any __attribute__((may_alias));
};
template <class Y>
struct BitsOf;
template <>
struct BitsOf<float> : Bits<uint32_t> {
  static constexpr uint32_t kInfinity = 0x7f800000;
};
template <>
struct BitsOf<bf16> : Bits<uint16_t> {
  static constexpr uint16_t kInfinity = 0x7f80;
};
template <>
struct BitsOf<f16> : Bits<uint16_t> {
  static constexpr uint16_t kInfinity = 0x7c00;
};
template <>
struct BitsOf<double> : Bits<uint64_t> {
  static constexpr uint64_t kInfinity = 0x7ff0000000000000;
};

template <class U>
constexpr U kMagnitude = U(U(~U(0)) >> 1);

// The position of the number with these bits, in two's complement; the function is its own
// inverse.
template <class U>
inline __attribute__((always_inline)) U position(U bits) {
  return U(bits ^ (U(U(0) - U(bits >> (8 * sizeof(U) - 1))) & kMagnitude<U>));
}

// ---------------------------------------------------------------- a row of a tile

// to = round(w + delta)
template <class Acc, class Y>
void add_row(const Y* w, const Acc* delta, Y* to, int64_t n) {
  int64_t c = 0;
  for (; c + kWidth<Acc> <= n; c += kWidth<Acc>) store<Acc>(to + c, load<Acc>(w + c) + load<Acc>(delta + c));
  if (c < n) store_some<Acc>(to + c, load_some<Acc>(w + c, n - c) + load_some<Acc>(delta + c, n - c), n - c);
}

// to = round(w - total)
template <class Acc, class Y>
void subtract_row(const Y* w, const Acc* total, Y* to, int64_t n) {
  int64_t c = 0;
  for (; c + kWidth<Acc> <= n; c += kWidth<Acc>) store<Acc>(to + c, load<Acc>(w + c) - load<Acc>(total + c));
  if (c < n) store_some<Acc>(to + c, load_some<Acc>(w + c, n - c) - load_some<Acc>(total + c, n - c), n - c);
}

template <class Acc>
void add_to_total(Acc* __restrict total, const Acc* __restrict delta, int64_t n) {
  for (int64_t c = 0; c < n; c++) total[c] += delta[c];
}

template <class Y>
bool is_finite(const Y* row, int64_t n) {
  using U = typename BitsOf<Y>::type;
  const auto* bits = reinterpret_cast<const typename BitsOf<Y>::any*>(row);
  U largest = 0;
  for (int64_t c = 0; c < n; c++) {
    const U magnitude = U(bits[c] & kMagnitude<U>);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < BitsOf<Y>::kInfinity;
}

template <class Y>
void encode_row(const Y* __restrict weights, const Y* __restrict backs, int8_t* __restrict codes, int64_t n) {
  using U = typename BitsOf<Y>::type;
  const auto* bits = reinterpret_cast<const typename BitsOf<Y>::any*>(weights);
  const auto* back_bits = reinterpret_cast<const typename BitsOf<Y>::any*>(backs);
  for (int64_t c = 0; c < n; c++) {
    const U back = back_bits[c], units = U(position<U>(bits[c]) - position<U>(back));
    const bool fits = U(units + kMostUnits) <= 2 * kMostUnits && U(back & kMagnitude<U>) <= BitsOf<Y>::kInfinity;
    const int8_t code = fits ? int8_t(units) : kListed;
    codes[c] = bits[c] == 0 ? kZero : code;
  }
}

// Writes the weights of before over V. Those that are listed stay V.
template <class Y>
void decode_row(Y* __restrict backs, const int8_t* __restrict codes, int64_t n) {
  using U = typename BitsOf<Y>::type;
  auto* bits = reinterpret_cast<typename BitsOf<Y>::any*>(backs);
  for (int64_t c = 0; c < n; c++) {
    const U decoded = position<U>(U(position<U>(bits[c]) + U(int(codes[c]))));
    const U back = bits[c];
    bits[c] = codes[c] == kZero ? U(0) : codes[c] == kListed ? back : decoded;
  }
}

// Calls f(column) for each weight of a row that is listed.
template <class F>
inline void for_listed(const int8_t* codes, int64_t n, F&& f) {
  constexpr uint64_t kOnes = 0x0101010101010101, kTops = 0x8080808080808080;
  for (int64_t c = 0; c < n; c += 8) {
    uint64_t word = 0;
    memcpy(&word, codes + c, size_t(smaller(8, n - c)));
    const uint64_t difference = word ^ kTops;  // zero bytes are kListed
    if (((difference - kOnes) & ~difference & kTops) == 0) continue;
    for (int64_t i = c; i < smaller(c + 8, n); i++)
      if (codes[i] == kListed) f(i);
  }
}

// ---------------------------------------------------------------- the checksum

constexpr uint64_t kKey = 0x9e3779b97f4a7c15;
typedef typename VectorOf<uint64_t, kVectorBytes / 8>::type Words;

inline uint64_t mixed(uint64_t word, uint64_t key) {
  const uint64_t m = word ^ key;
  return word + uint64_t(uint32_t(m)) * (m >> 32);
}

// The share of a row, or of a part of it that begins at word `first` of the matrix. Words are of
// eight bytes; the last one of a row is filled up with zeros.
inline uint64_t row_checksum(const void* row, int64_t bytes, uint64_t first) {
  constexpr int kLanes = kVectorBytes / 8;
  const char* data = static_cast<const char*>(row);
  int64_t at = 0;
  Words sum = {}, key = {};
  for (int i = 0; i < kLanes; i++) key[i] = (first + uint64_t(i) + 1) * kKey;
  for (; at + kVectorBytes <= bytes; at += kVectorBytes, key += kLanes * kKey) {
    Words words;
    memcpy(&words, data + at, sizeof words);
    const Words m = words ^ key;
    sum += words + (m & 0xffffffff) * (m >> 32);
  }
  uint64_t total = 0;
  for (int i = 0; i < kLanes; i++) total += sum[i];
  for (; at < bytes; at += 8) {
    uint64_t word = 0;
    memcpy(&word, data + at, size_t(smaller(8, bytes - at)));
    total += mixed(word, (first + uint64_t(at / 8) + 1) * kKey);
  }
  return total;
}

}  // namespace gralora::cpu::GRALORA_ISA
