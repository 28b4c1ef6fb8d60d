// SPDX-License-Identifier: Apache-2.0
// What plans and kernels need to know about the processor. It is found out once.
//
// The kernels use the best instruction set that this build holds and that this processor and its
// system can run. The environment variable GRALORA_EXT_CPU_CAPABILITY (default, avx2 or avx512)
// caps that choice, and GRALORA_EXT_CPU_AMX=0 leaves AMX alone.
#pragma once

#include <cstdint>
#include <vector>

// GCC 11 and later come with an assembler that knows AMX.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11
#define GRALORA_HAVE_AMX
#endif

namespace gralora::cpu {

// In rising order: a processor that runs one of them runs those before it.
enum class Capability : int8_t { Default, Avx2, Avx512 };

// Of the registers that the kernels use, and that plans count with.
constexpr int vector_bytes(Capability capability) {
  return capability == Capability::Avx512 ? 64 : capability == Capability::Avx2 ? 32 : 16;
}

enum class Vendor : int8_t { Amd, Intel, Other };

// A number is 0 where the system does not tell it.
struct CacheLevel {
  int64_t bytes = 0, ways = 0;
};

struct Machine {
  Vendor vendor = Vendor::Other;
  Capability capability = Capability::Default;  // the instruction set in use
  bool bf16_instructions = false;               // AVX512-BF16 is there, and Avx512 in use
  // AMX for bfloat16 is there and allowed, and Avx512 in use
  bool amx = false;
  CacheLevel l1, l2;  // the data caches of one core

  int64_t vector_bytes() const { return cpu::vector_bytes(capability); }
};

// Throws std::invalid_argument where one of the environment variables above has a value that is
// not allowed.
const Machine& machine();

// Whether the processor has AVX512-BF16, as a variable: the kernels ask within their loops, where
// a call of machine() would cost too much.
extern const bool kHasBf16Instructions __attribute__((visibility("hidden")));

// The names are "default", "avx2", "avx512" and "amd", "intel", "other".
const char* name(Capability capability);
const char* name(Vendor vendor);

// The instruction sets that the kernels were compiled for, in rising order. Default is always
// there.
std::vector<Capability> compiled_capabilities();

}  // namespace gralora::cpu
