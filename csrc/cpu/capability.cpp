// SPDX-License-Identifier: Apache-2.0
#include "capability.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(GRALORA_HAVE_AVX2) || defined(GRALORA_HAVE_AVX512)
#include <cpuid.h>
#endif
#ifdef GRALORA_HAVE_TILES
#include <sys/syscall.h>
#endif
#ifdef __linux__
#include <unistd.h>
#endif

namespace gralora::cpu {
namespace {

constexpr Capability kAll[] = {Capability::Default, Capability::Avx2, Capability::Avx512};

#if defined(GRALORA_HAVE_AVX2) || defined(GRALORA_HAVE_AVX512)
// By cpuid: older compilers do not know this name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

// __builtin_cpu_supports also asks whether the system saves the wide registers.
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef GRALORA_EMULATE_TILES
bool runs_tiles() { return true; }
#elif defined(GRALORA_HAVE_TILES) && defined(GRALORA_HAVE_AVX512)
// Linux saves the tiles of processes that asked for it; the request fails where a thread's signal
// stack is too small for them.
bool runs_tiles() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  return __builtin_cpu_supports("avx512bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
bool runs_tiles() { return false; }
#endif

bool runs_bf16_instructions() {
#ifdef GRALORA_HAVE_AVX512
  __builtin_cpu_init();
  return bool(__builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

bool tiles_allowed() {
  const char* value = std::getenv("GRALORA_EXT_CPU_AMX");
  const std::string word = value == nullptr ? "" : value;
  if (word.empty() || word == "auto") return true;
  if (word == "0") return false;
  throw std::invalid_argument("GRALORA_EXT_CPU_AMX must be auto or 0, or unset, but it is '" + word + "'");
}

bool is_compiled(Capability capability) {
  switch (capability) {
    case Capability::Default: return true;
    case Capability::Avx2:
#ifdef GRALORA_HAVE_AVX2
      return true;
#else
      return false;
#endif
    case Capability::Avx512:
#ifdef GRALORA_HAVE_AVX512
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool processor_runs(Capability capability) {
#if defined(GRALORA_HAVE_AVX2) || defined(GRALORA_HAVE_AVX512)
  if (capability == Capability::Avx2) return runs_avx2();
  if (capability == Capability::Avx512) return runs_avx512();
#endif
  return capability == Capability::Default;
}

Capability cap_from_environment() {
  const char* value = std::getenv("GRALORA_EXT_CPU_CAPABILITY");
  if (value == nullptr || *value == '\0') return Capability::Avx512;
  for (const Capability capability : kAll) {
    if (std::string(value) == capability_name(capability)) return capability;
  }
  throw std::invalid_argument(
      std::string("GRALORA_EXT_CPU_CAPABILITY must be default, avx2 or avx512, or unset, but it is '") + value + "'");
}

Capability choose() {
  const Capability cap = cap_from_environment();
  Capability best = Capability::Default;
  for (const Capability capability : kAll) {
    if (capability <= cap && is_compiled(capability) && processor_runs(capability)) best = capability;
  }
  return best;
}

}  // namespace

const bool kHasBf16Instructions = runs_bf16_instructions();
const bool kPairsAreQuicker = kHasBf16Instructions && std::strcmp(vendor(), "intel") != 0;
const bool kFetchesMore = std::strcmp(vendor(), "amd") == 0;

const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::Default: return "default";
    case Capability::Avx2: return "avx2";
    case Capability::Avx512: return "avx512";
  }
  return "unknown";
}

std::vector<Capability> compiled_capabilities() {
  std::vector<Capability> compiled;
  for (const Capability capability : kAll) {
    if (is_compiled(capability)) compiled.push_back(capability);
  }
  return compiled;
}

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

bool has_tiles() {
  static const bool has = tiles_allowed() && capability() == Capability::Avx512 && runs_tiles();
  return has;
}

const char* vendor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}

int l1_ways() {
#ifdef _SC_LEVEL1_DCACHE_ASSOC
  static const long ways = sysconf(_SC_LEVEL1_DCACHE_ASSOC);
  if (ways > 0) return int(ways);
#endif
  return 12;
}

}  // namespace gralora::cpu
