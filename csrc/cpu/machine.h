// SPDX-License-Identifier: Apache-2.0
// What plans and kernels ask about the processor, found out once, when the library is loaded.
//
// The kernels use the best instruction set that this build holds and that this processor and its
// system can run. The environment variable GRALORA_EXT_CPU_CAPABILITY (default, avx2 or avx512)
// caps that choice, and GRALORA_EXT_CPU_AMX=0 leaves AMX alone.
#pragma once

#include <cstdint>
#include <vector>

// GCC of that age comes with an assembler that knows AMX.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11
#define GRALORA_HAVE_AMX
#endif

namespace gralora::cpu {

// In rising order; a processor that runs one runs those before it.
enum class Capability : int8_t { Default, Avx2, Avx512 };

enum class Vendor : int8_t { Amd, Intel, Other };

// 0 where the system does not tell
struct CacheLevel {
  int64_t bytes = 0, ways = 0;
};

struct Machine {
  Vendor vendor = Vendor::Other;
  Capability capability = Capability::Default;  // the instruction set in use
  bool bf16_instructions = false;               // AVX512-BF16, beside Avx512
  bool amx = false;                             // AMX's tiles of bfloat16, beside Avx512
  CacheLevel l1, l2;                            // of data, of one core

  int64_t vector_bytes() const {
    return capability == Capability::Avx512 ? 64 : capability == Capability::Avx2 ? 32 : 16;
  }
};

// Throws std::invalid_argument where one of the environment variables holds another word than those
// above.
const Machine& machine();

// What the kernels ask within their loops, where a call would cost more than the question.
extern const bool kHasBf16Instructions __attribute__((visibility("hidden")));

// "default", "avx2" or "avx512"; "amd", "intel" or "other".
const char* name(Capability capability);
const char* name(Vendor vendor);

// The instruction sets that the kernels were compiled for, in rising order; Default is always
// there.
std::vector<Capability> compiled_capabilities();

}  // namespace gralora::cpu
