// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels use: the best that this build holds and this processor (with
// its system) can run, capped by the environment variable GRALORA_EXT_CPU_CAPABILITY.
#pragma once

#include <vector>

// GCC of that age comes with an assembler that knows AMX.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11
#define GRALORA_HAVE_TILES
#endif

namespace gralora::cpu {

// In rising order; a processor that runs one runs those before it.
enum class Capability { Default, Avx2, Avx512 };

// "default", "avx2" or "avx512".
const char* capability_name(Capability capability);

// The instruction sets that the kernels were compiled for, in rising order; Default is always
// there.
std::vector<Capability> compiled_capabilities();

// Chosen at the first call and fixed for the life of the process. Throws std::invalid_argument
// where the environment variable holds another word than the three names.
Capability capability();

// Whether products of bfloat16 activations are by AMX's tiles: beside AVX-512, where the processor
// has them and the system lets this process use them, for which the first call asks. Not with
// GRALORA_EXT_CPU_AMX=0; throws std::invalid_argument where that is set to another word than 0 or
// auto.
bool has_tiles();

// Who made the processor: "amd", "intel" or "other".
const char* vendor();

// What the kernels ask within their loops. Found out when the library is loaded, in capability.cpp,
// which any processor runs: the kernels' own files must not run anything then.
#define GRALORA_HIDDEN __attribute__((visibility("hidden")))
extern const bool kHasBf16Instructions GRALORA_HIDDEN;  // AVX512-BF16
extern const bool kPairsAreQuicker
    GRALORA_HIDDEN;  // its products than those of floats: on Intel's they take four times as long
extern const bool kFetchesMore GRALORA_HIDDEN;  // beside products than the rows they need next: AMD's have lines enough
#undef GRALORA_HIDDEN

// How many lines of a set its first cache of data holds, or 12 where the system does not tell.
int l1_ways();

}  // namespace gralora::cpu
