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

// As many bits as a vector register holds
template <class U>
constexpr int kBitLanes = kVectorBytes / int(sizeof(U));
template <class U>
using BitLanes = typename VectorOf<U, kBitLanes<U>>::type;

template <class V, class Y>
inline __attribute__((always_inline)) V load_bits(const Y* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

// The position of the number with these bits, in two's complement; the function is its own
// inverse.
template <class U>
inline __attribute__((always_inline)) BitLanes<U> position(BitLanes<U> bits, BitLanes<U> magnitude) {
  const BitLanes<U> sign = bits >> (8 * sizeof(U) - 1);
  return bits ^ ((BitLanes<U>{} - sign) & magnitude);
}

// kNR weights, rounded to their dtype. In registers where there is a way: stored in parts and read
// as a whole, or the other way round, they would wait until all is in the cache.
template <class Acc, class Y>
struct Rounded {
  Y weights[kNR<Acc>];

  explicit Rounded(const Vec<Acc> (&v)[2]) { store_row<Acc, Y, 2>(weights, v); }
  inline __attribute__((always_inline)) void widen(Vec<Acc> (&v)[2]) const {
    for (int i = 0; i < 2; i++) v[i] = load<Acc>(weights + i * kWidth<Acc>);
  }
  template <class V>
  inline __attribute__((always_inline)) V bits(int64_t first) const {
    return load_bits<V>(weights + first);
  }
};

#if defined(__AVX512F__)
template <class Y>
struct RoundedHalf {
  __m512i both;

  explicit RoundedHalf(__m512i both) : both(both) {}
  inline __attribute__((always_inline)) void widen(Vec<float> (&v)[2]) const {
    using Half = typename Access<float, Y>::Half;
    v[0] = Access<float, Y>::widen(bit_cast<Half>(_mm512_castsi512_si256(both)));
    v[1] = Access<float, Y>::widen(bit_cast<Half>(_mm512_extracti64x4_epi64(both, 1)));
  }
  template <class V>
  inline __attribute__((always_inline)) V bits(int64_t) const {
    return V(both);
  }
};
template <>
struct Rounded<float, bf16> : RoundedHalf<bf16> {
  explicit Rounded(const Vec<float> (&v)[2]) : RoundedHalf(rounded(v)) {}
  static inline __attribute__((always_inline)) __m512i rounded(const Vec<float> (&v)[2]) {
    __m512i both;
    const __mmask16 a = _mm512_fpclass_ps_mask(__m512(v[0]), 0x20), b = _mm512_fpclass_ps_mask(__m512(v[1]), 0x20);
    if (__builtin_expect(kHasBf16Instructions && _kortestz_mask16_u8(a, b), 1)) {  // as in store_row
      asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(v[1]), "v"(v[0]));
      return both;
    }
    bf16 weights[kNR<float>];
    store_row<float, bf16, 2>(weights, v);
    return load_bits<__m512i>(weights);
  }
};
template <>
struct Rounded<float, f16> : RoundedHalf<f16> {
  explicit Rounded(const Vec<float> (&v)[2])
      : RoundedHalf(_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(__m512(v[0]), _MM_FROUND_TO_NEAREST_INT)),
                                       _mm512_cvtps_ph(__m512(v[1]), _MM_FROUND_TO_NEAREST_INT), 1)) {}
};
#endif

// Which of the codes of a vector are kListed, one bit for each
template <class U>
inline __attribute__((always_inline)) uint32_t listed(BitLanes<U> code, BitLanes<U> is_listed) {
#if defined(__AVX512F__)
  if constexpr (sizeof(U) == 2) return _mm512_cmpeq_epi16_mask(__m512i(code), __m512i(is_listed));
  if constexpr (sizeof(U) == 4) return _mm512_cmpeq_epi32_mask(__m512i(code), __m512i(is_listed));
#endif
  uint32_t found = 0;
  for (int i = 0; i < kBitLanes<U>; i++) found |= uint32_t(code[i] == is_listed[i]) << i;
  return found;
}

// The constants of a code, held in registers: GCC would make them anew for each vector.
template <class Y>
struct CodeConstants {
  using U = typename BitsOf<Y>::type;
  BitLanes<U> magnitude = BitLanes<U>{} + kMagnitude<U>, infinity = BitLanes<U>{} + BitsOf<Y>::kInfinity;
  BitLanes<U> most = BitLanes<U>{} + U(kMostUnits), range = BitLanes<U>{} + U(2 * kMostUnits);
  BitLanes<U> listed = BitLanes<U>{} + U(kListed), zero = BitLanes<U>{} + U(kZero);

  CodeConstants() {
#if defined(__x86_64__)
    asm("" : "+x"(magnitude), "+x"(infinity), "+x"(most), "+x"(range), "+x"(listed), "+x"(zero));
#endif
  }
};

// A row of a tile, all of its parts as wide as whole micro-tiles
template <class Acc, class Y>
struct CodedRow {
  using U = typename BitsOf<Y>::type;
  const Acc* sums;  // dW of the first adapter; those of the others follow at `stride`
  int64_t stride, count;

  // kNR weights from column c on: W' of all adapters, and the codes; `any` gets a bit for each
  // kListed
  template <bool one_adapter>
  inline __attribute__((always_inline)) Rounded<Acc, Y> merge(const Y* w, int64_t c, const CodeConstants<Y>& k,
                                                              int8_t* codes, uint32_t& any) const {
    Vec<Acc> total[2], v[2];
    for (int i = 0; i < 2; i++) {
      total[i] = load<Acc>(sums + c + i * kWidth<Acc>);
      v[i] = load<Acc>(w + i * kWidth<Acc>) + total[i];
    }
    Rounded<Acc, Y> merged(v);
    for (int64_t a = 1; !one_adapter && a < count; a++) {
      merged.widen(v);
      for (int i = 0; i < 2; i++) {
        const Vec<Acc> delta = load<Acc>(sums + a * stride + c + i * kWidth<Acc>);
        v[i] += delta, total[i] += delta;
      }
      merged = Rounded<Acc, Y>(v);
    }
    merged.widen(v);
    for (int i = 0; i < 2; i++) v[i] -= total[i];
    const Rounded<Acc, Y> backs(v);
    for (int64_t i = 0; i < kNR<Acc>; i += kBitLanes<U>) {
      const auto bits = load_bits<BitLanes<U>>(w + i), back = backs.template bits<BitLanes<U>>(i);
      const BitLanes<U> units = position<U>(bits, k.magnitude) - position<U>(back, k.magnitude);
      const auto fits = (units + k.most <= k.range) & ((back & k.magnitude) <= k.infinity);
      BitLanes<U> code = fits ? units : k.listed;
      code = bits == 0 ? k.zero : code;
      const auto bytes = __builtin_convertvector(code, Bytes);
      memcpy(codes + i, &bytes, sizeof bytes);
      any |= listed<U>(code, k.listed) << i;
    }
    return merged;
  }

  // The first adapter after which one of kNR weights is not finite, if it is below `bad`, else
  // `bad`
  inline int64_t first_not_finite(const Y* w, int64_t c, int64_t bad) const {
    Y merged[kNR<Acc>];
    Vec<Acc> v[2] = {load<Acc>(w), load<Acc>(w + kWidth<Acc>)};
    for (int64_t a = 0; a < bad; a++) {
      for (int i = 0; i < 2; i++) v[i] += load<Acc>(sums + a * stride + c + i * kWidth<Acc>);
      store_row<Acc, Y, 2>(merged, v);
      for (int i = 0; i < 2; i++) v[i] = load<Acc>(merged + i * kWidth<Acc>);
      for (const Y& weight : merged)
        if ((bit_cast<U>(weight) & kMagnitude<U>) >= BitsOf<Y>::kInfinity) return a;
    }
    return bad;
  }

  // kNR weights of before, from W' and the codes; those that are listed are left to be written
  inline __attribute__((always_inline)) void unmerge(const Y* merged, int64_t c, const CodeConstants<Y>& k,
                                                     const int8_t* codes, Y* w) const {
    Vec<Acc> total[2];
    for (int i = 0; i < 2; i++) {
      total[i] = load<Acc>(sums + c + i * kWidth<Acc>);
      for (int64_t a = 1; a < count; a++) total[i] += load<Acc>(sums + a * stride + c + i * kWidth<Acc>);
    }
    Vec<Acc> v[2];
    for (int i = 0; i < 2; i++) v[i] = load<Acc>(merged + i * kWidth<Acc>) - total[i];
    const Rounded<Acc, Y> backs(v);
    for (int64_t i = 0; i < kNR<Acc>; i += kBitLanes<U>) {
      const auto units = __builtin_convertvector(load_bits<Bytes>(codes + i), BitLanes<U>);
      const BitLanes<U> bits =
          position<U>(position<U>(backs.template bits<BitLanes<U>>(i), k.magnitude) + units, k.magnitude);
      const BitLanes<U> weights = units == k.zero ? BitLanes<U>{} : bits;
      memcpy(w + i, &weights, sizeof weights);
    }
  }

 private:
  using Bytes = typename VectorOf<int8_t, kBitLanes<U>>::type;
};

// ---------------------------------------------------------------- the checksums

// Words are eight bytes of a row; the last one of a row is filled up with zeros. `before` of a
// matrix is the sum of its words, which tells it from the merged one; `after` the sum of
// mixed(word, key), with another key for each place, which tells whether anything was changed.
constexpr uint64_t kKey = 0x9e3779b97f4a7c15;
typedef BitLanes<uint64_t> Words;

inline __attribute__((always_inline)) Words mixed(Words words, Words keys) {
  const Words m = words ^ keys;
#if defined(__AVX512F__)
  return Words(_mm512_mul_epu32(__m512i(m), __m512i(m >> 32)));
#else
  return (m & 0xffffffff) * (m >> 32);
#endif
}

// The checksums, lane by lane, of rows or parts of them that begin at word `first` of a matrix
struct Checksums {
  Words before = {}, after = {}, keys = {};

  void begin(int64_t first) {
    for (int i = 0; i < kBitLanes<uint64_t>; i++) keys[i] = uint64_t(i + 1) * kKey;
    keys += uint64_t(first) * kKey;
  }
  // The next words; the matrix of `before` may be another one than that of `after`.
  inline __attribute__((always_inline)) void add(Words of_before, Words of_after) {
    before += of_before, after += mixed(of_after, keys);
    keys += kBitLanes<uint64_t> * kKey;
  }
  void add_row(const void* of_before, const void* of_after, int64_t bytes, int64_t first) {
    const auto *a = static_cast<const char*>(of_before), *b = static_cast<const char*>(of_after);
    int64_t at = 0;
    for (begin(first); at + kVectorBytes <= bytes; at += kVectorBytes)
      add(load_bits<Words>(a + at), load_bits<Words>(b + at));
    if (at >= bytes) return;
    Words of_a = {}, of_b = {};
    memcpy(&of_a, a + at, size_t(bytes - at)), memcpy(&of_b, b + at, size_t(bytes - at));
    const Words share = mixed(of_b, keys);
    before += of_a;
    for (int i = 0; i < kBitLanes<uint64_t>; i++) after[i] += i * 8 < bytes - at ? share[i] : 0;
  }
  // A row of which `before` alone is asked
  void add_row_before(const void* row, int64_t bytes) {
    const auto* from = static_cast<const char*>(row);
    int64_t at = 0;
    for (; at + kVectorBytes <= bytes; at += kVectorBytes) before += load_bits<Words>(from + at);
    Words rest = {};
    memcpy(&rest, from + at, size_t(bytes - at));
    before += rest;
  }
  // Adds all lanes to shared numbers.
  void add_to(uint64_t& before_sum, uint64_t& after_sum) const {
    uint64_t a = 0, b = 0;
    for (int i = 0; i < kBitLanes<uint64_t>; i++) a += before[i], b += after[i];
    __atomic_fetch_add(&before_sum, a, __ATOMIC_RELAXED);
    __atomic_fetch_add(&after_sum, b, __ATOMIC_RELAXED);
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
