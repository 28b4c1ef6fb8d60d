// SPDX-License-Identifier: Apache-2.0
// Vectors of the accumulation type, of one width per instruction set, and the loads and stores
// that convert from and to the dtypes of tensors.
//
// The kernel files are compiled once per instruction set (GRALORA_CPU_CAPABILITY). Everything here
// is in a namespace of that set, and no template of the standard library that becomes code is
// used, so that the linker can never mix the code of two sets.
#pragma once

#include <cstdint>
#include <cstring>

#include "machine.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef GRALORA_CPU_CAPABILITY
#error "define GRALORA_CPU_CAPABILITY: default, avx2 or avx512"
#endif
#define GRALORA_ISA_CONCAT(name) isa_##name
#define GRALORA_ISA_NAMESPACE(name) GRALORA_ISA_CONCAT(name)
#define GRALORA_ISA GRALORA_ISA_NAMESPACE(GRALORA_CPU_CAPABILITY)

namespace gralora::cpu::GRALORA_ISA {

// Float64 serves gradient checks and is not tuned. Only the portable kernels have it, which halves
// the build time.
#if defined(__AVX512F__) || defined(__AVX2__)
constexpr bool kHasFloat64 = false;
#else
constexpr bool kHasFloat64 = true;
#endif

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

// Plans count with the width that belongs to the set's name.
namespace capability_of {
constexpr Capability isa_default = Capability::Default, isa_avx2 = Capability::Avx2, isa_avx512 = Capability::Avx512;
}
static_assert(kVectorBytes == vector_bytes(capability_of::GRALORA_ISA),
              "the compiler's flags are those of another instruction set than GRALORA_CPU_CAPABILITY names");

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T, int W>
struct VectorOf {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};

template <class Acc>
constexpr int kWidth = kVectorBytes / int(sizeof(Acc));
template <class Acc>
using Vec = typename VectorOf<Acc, kWidth<Acc>>::type;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---------------------------------------------------------------- memory

// Reads one element. A float in memory may in truth be a pair of bf16 (product_pairs.h). C++ does
// not allow reading that as a float, except through a type that may alias.
typedef float AnyFloat __attribute__((may_alias));
inline __attribute__((always_inline)) float element(const float* p) { return *reinterpret_cast<const AnyFloat*>(p); }
template <class T>
inline __attribute__((always_inline)) T element(const T* p) {
  return *p;
}

// What is prefetched may lie beyond the end of an array, where C++ allows no pointer. Such
// addresses are therefore computed as numbers.
template <class T>
inline __attribute__((always_inline)) uintptr_t address(const T* p, int64_t elements = 0) {
  return reinterpret_cast<uintptr_t>(p) + uintptr_t(elements) * sizeof(T);
}
template <int for_writing = 0, int locality = 3>
inline __attribute__((always_inline)) void prefetch(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address), for_writing, locality);
}

// ---------------------------------------------------------------- one element

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  // The exponent is rebiased by a multiplication, which also normalises subnormals; 0x7c00 marks
  // infinity and NaN.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t value = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  if ((x.bits & 0x7c00) == 0x7c00) value = magnitude | 0x7f800000u;
  return bit_cast<float>(value | uint32_t(x.bits & 0x8000) << 16);
}

template <class Acc, class T>
inline Acc to_acc(T x) {
  return Acc(to_float(x));
}
template <class Acc>
inline Acc to_acc(double x) {
  return Acc(x);
}

inline void from_float(float x, float& to) { to = x; }
inline void from_float(float x, bf16& to) {
  const uint32_t u = bit_cast<uint32_t>(x);
  to.bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void from_float(float x, f16& to) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000u) {
    to.bits = uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    to.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000u) {  // below 2^-14: 0.5 more leaves the subnormal in low bits
    to.bits = uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u));
  } else {
    to.bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
}

template <class T, class Acc>
inline T from_acc(Acc x) {
  T to;
  if constexpr (sizeof(T) == sizeof(double))
    to = x;
  else
    from_float(float(x), to);
  return to;
}

// ---------------------------------------------------------------- one vector

template <class Acc, class T>
struct Access {
  static Vec<Acc> load(const T* p) {
    Vec<Acc> v{};
    for (int i = 0; i < kWidth<Acc>; i++) v[i] = to_acc<Acc>(p[i]);
    return v;
  }
  static void store(T* p, Vec<Acc> v) {
    for (int i = 0; i < kWidth<Acc>; i++) p[i] = from_acc<T>(Acc(v[i]));
  }
};

#if defined(__AVX512F__)
// AVX512-BF16 rounds 32 floats in one instruction instead of a dozen, but takes subnormals for
// zero. Vectors that hold a subnormal therefore go the long way. The instruction is written as
// assembly, so that the kernels need not be compiled for a fourth instruction set.
inline bool any_subnormal(Vec<float> v) { return _mm512_fpclass_ps_mask(__m512(v), 0x20) != 0; }
#endif

template <class Acc>
struct Access<Acc, Acc> {
  static Vec<Acc> load(const Acc* p) {
    Vec<Acc> v{};
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(Acc* p, Vec<Acc> v) { memcpy(p, &v, sizeof v); }
};

template <>
struct Access<float, bf16> {
  typedef typename VectorOf<uint16_t, kWidth<float>>::type Half;
  typedef typename VectorOf<uint32_t, kWidth<float>>::type Word;
  static Vec<float> widen(Half half) {
#if defined(__AVX512F__)
    // GCC 12 would convert half a vector at a time, through memory.
    return Vec<float>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(half)), 16)));
#else
    return bit_cast<Vec<float>>(__builtin_convertvector(half, Word) << 16);
#endif
  }
  static Vec<float> load(const bf16* p) {
    Half half;
    memcpy(&half, p, sizeof half);
    return widen(half);
  }
  static void store(bf16* p, Vec<float> v) {
#if defined(__AVX512F__)
    if (kHasBf16Instructions && !any_subnormal(v)) {
      __m256i half;
      asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));
      memcpy(p, &half, sizeof half);
      return;
    }
#endif
    const Word u = bit_cast<Word>(v);
    const Word nan = bit_cast<Word>(v != v);
    const Word rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, quiet = u >> 16 | 0x40;
    const Half half = __builtin_convertvector((nan & quiet) | (~nan & rounded), Half);
    memcpy(p, &half, sizeof half);
  }
};

#if defined(__AVX512F__)
template <>
struct Access<float, f16> {
  typedef __m256i Half;
  static Vec<float> widen(Half half) { return Vec<float>(_mm512_cvtph_ps(half)); }
  static Vec<float> load(const f16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(f16* p, Vec<float> v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
  }
};
#elif defined(__F16C__)
template <>
struct Access<float, f16> {
  static Vec<float> load(const f16* p) {
    return Vec<float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(f16* p, Vec<float> v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
  }
};
#endif

template <class Acc, class T>
inline Vec<Acc> load(const T* p) {
  return Access<Acc, T>::load(p);
}
template <class Acc, class T>
inline void store(T* p, Vec<Acc> v) {
  Access<Acc, T>::store(p, v);
}

// a*b + c, rounded once where the processor can. Written out, since GCC decides for each copy of
// an unrolled loop whether to fuse a*b + c, and equal sums could then differ.
template <class Acc>
inline Vec<Acc> multiply_add(Vec<Acc> a, Acc b, Vec<Acc> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == sizeof(float)) return Vec<Acc>(_mm512_fmadd_ps(__m512(a), _mm512_set1_ps(b), __m512(c)));
#elif defined(__FMA__)
  if constexpr (sizeof(Acc) == sizeof(float)) return Vec<Acc>(_mm256_fmadd_ps(__m256(a), _mm256_set1_ps(b), __m256(c)));
#endif
  return a * b + c;
}

// The first `count` elements, at most a whole vector of them, followed by zeros. Nothing beyond
// them is read.
template <class Acc, class T>
inline Vec<Acc> load_some(const T* p, int64_t count) {
  if (count >= kWidth<Acc>) return load<Acc>(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == sizeof(float)) {
    const __mmask16 some = count <= 0 ? 0 : (1 << count) - 1;
    if constexpr (sizeof(T) == sizeof(float))
      return Vec<Acc>(_mm512_maskz_loadu_ps(some, p));
    else
      return Access<Acc, T>::widen(bit_cast<typename Access<Acc, T>::Half>(_mm256_maskz_loadu_epi16(some, p)));
  }
#endif
  Vec<Acc> v{};
  for (int64_t i = 0; i < count; i++) v[i] = to_acc<Acc>(p[i]);
  return v;
}

// Stores the first `count` elements of v, at most all of them. Nothing beyond them is written.
template <class Acc, class T>
inline void store_some(T* p, Vec<Acc> v, int64_t count) {
  if (count >= kWidth<Acc>) return store<Acc>(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == sizeof(float)) {
    const __mmask16 some = count <= 0 ? 0 : (1 << count) - 1;
    if constexpr (sizeof(T) == sizeof(float)) {
      _mm512_mask_storeu_ps(p, some, __m512(v));
    } else {
      T all[kWidth<Acc>];
      store<Acc>(all, v);
      _mm256_mask_storeu_epi16(p, some, bit_cast<__m256i>(all));
    }
    return;
  }
#endif
  T all[kWidth<Acc>];
  store<Acc>(all, v);
  for (int64_t i = 0; i < count; i++) p[i] = all[i];
}

// Stores one row of a micro-tile: NV vectors side by side.
template <class Acc, class T, int NV>
inline __attribute__((always_inline)) void store_row(T* p, const Vec<Acc> (&v)[NV]) {
#pragma GCC unroll 2
  for (int i = 0; i < NV; i++) store<Acc>(p + i * kWidth<Acc>, v[i]);
}

#if defined(__AVX512F__)
template <>
inline __attribute__((always_inline)) void store_row<float, bf16, 2>(bf16* p, const Vec<float> (&v)[2]) {
  if (kHasBf16Instructions && !(any_subnormal(v[0]) | any_subnormal(v[1]))) {
    __m512i both;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(v[1]), "v"(v[0]));
    memcpy(p, &both, sizeof both);
  } else {
    store<float>(p, v[0]), store<float>(p + kWidth<float>, v[1]);
  }
}
#endif

}  // namespace gralora::cpu::GRALORA_ISA
