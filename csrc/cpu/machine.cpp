// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(GRALORA_HAVE_AVX2) || defined(GRALORA_HAVE_AVX512)
#include <cpuid.h>
#endif
#ifdef GRALORA_HAVE_AMX
#include <sys/syscall.h>
#endif
#ifdef __linux__
#include <unistd.h>
#endif

namespace gralora::cpu {
namespace {

constexpr Capability kAll[] = {Capability::Default, Capability::Avx2, Capability::Avx512};
constexpr Capability kCompiled[] = {
    Capability::Default,
#ifdef GRALORA_HAVE_AVX2
    Capability::Avx2,
#endif
#ifdef GRALORA_HAVE_AVX512
    Capability::Avx512,
#endif
};

// ------------------------------------------------------------------ what the processor has

#if defined(GRALORA_HAVE_AVX2) || defined(GRALORA_HAVE_AVX512)
// This asks cpuid, since older compilers do not know "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

bool processor_runs(Capability capability) {
#if defined(GRALORA_HAVE_AVX2) || defined(GRALORA_HAVE_AVX512)
  if (capability == Capability::Avx2) return runs_avx2();
  if (capability == Capability::Avx512) return runs_avx512();
#endif
  return capability == Capability::Default;
}

bool runs_bf16_instructions() {
#ifdef GRALORA_HAVE_AVX512
  __builtin_cpu_init();
  return bool(__builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

#ifdef GRALORA_EMULATE_AMX
bool runs_amx() { return true; }
#elif defined(GRALORA_HAVE_AMX) && defined(GRALORA_HAVE_AVX512)
// Linux saves the tile registers only of a process that asked for it. The request fails where the
// signal stack of a thread is too small for them.
bool runs_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  return runs_bf16_instructions() && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
bool runs_amx() { return false; }
#endif

Vendor made_by() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return Vendor::Amd;
  if (__builtin_cpu_is("intel")) return Vendor::Intel;
#endif
  return Vendor::Other;
}

// Numbers are 0 where the system does not tell them.
CacheLevel cache_level([[maybe_unused]] int bytes_name, [[maybe_unused]] int ways_name) {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  const long bytes = sysconf(bytes_name), ways = sysconf(ways_name);
  return {bytes > 0 ? bytes : 0, ways > 0 ? ways : 0};
#else
  return {};
#endif
}

// ------------------------------------------------------------------ what the user allows

std::string environment(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? "" : value;
}

Capability best_capability() {
  const std::string word = environment("GRALORA_EXT_CPU_CAPABILITY");
  Capability cap = Capability::Avx512;
  bool known = word.empty();
  for (const Capability capability : kAll) {
    if (word == name(capability)) cap = capability, known = true;
  }
  if (!known)
    throw std::invalid_argument("GRALORA_EXT_CPU_CAPABILITY must be default, avx2 or avx512, or unset, but it is '" +
                                word + "'");
  Capability best = Capability::Default;
  for (const Capability capability : kCompiled) {
    if (capability <= cap && processor_runs(capability)) best = capability;
  }
  return best;
}

bool amx_is_allowed() {
  const std::string word = environment("GRALORA_EXT_CPU_AMX");
  if (word.empty() || word == "auto") return true;
  if (word == "0") return false;
  throw std::invalid_argument("GRALORA_EXT_CPU_AMX must be auto or 0, or unset, but it is '" + word + "'");
}

Machine this_machine() {
  Machine m;
  m.vendor = made_by();
  m.capability = best_capability();
  const bool avx512 = m.capability == Capability::Avx512;
  m.bf16_instructions = avx512 && runs_bf16_instructions();
  m.amx = amx_is_allowed() && avx512 && runs_amx();
#ifdef _SC_LEVEL1_DCACHE_SIZE
  m.l1 = cache_level(_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL1_DCACHE_ASSOC);
  m.l2 = cache_level(_SC_LEVEL2_CACHE_SIZE, _SC_LEVEL2_CACHE_ASSOC);
#endif
  return m;
}

}  // namespace

const bool kHasBf16Instructions = runs_bf16_instructions();

const Machine& machine() {
  static const Machine filled = this_machine();
  return filled;
}

// The names stand in the order of the enumerators.
const char* name(Capability capability) {
  constexpr const char* kNames[] = {"default", "avx2", "avx512"};
  return kNames[int(capability)];
}
const char* name(Vendor vendor) {
  constexpr const char* kNames[] = {"amd", "intel", "other"};
  return kNames[int(vendor)];
}

std::vector<Capability> compiled_capabilities() { return {std::begin(kCompiled), std::end(kCompiled)}; }

}  // namespace gralora::cpu
