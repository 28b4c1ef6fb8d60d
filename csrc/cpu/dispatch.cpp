// SPDX-License-Identifier: Apache-2.0
// The run-time choice of the instruction set: each pass goes to the kernels compiled for the
// capability in use, float64 to the portable ones, which alone hold it.
#include "../gralora.h"
#include "capability.h"

namespace gralora::cpu {

#define GRALORA_DECLARE_KERNELS(isa)      \
  namespace isa {                         \
  void forward(const ForwardParams& p);   \
  void backward(const BackwardParams& p); \
  void merge(const MergeParams& p);       \
  void linear(const LinearParams& p);     \
  }

GRALORA_DECLARE_KERNELS(isa_default)
#ifdef GRALORA_HAVE_AVX2
GRALORA_DECLARE_KERNELS(isa_avx2)
#endif
#ifdef GRALORA_HAVE_AVX512
GRALORA_DECLARE_KERNELS(isa_avx512)
#endif

namespace {

struct Kernels {
  void (*forward)(const ForwardParams&);
  void (*backward)(const BackwardParams&);
  void (*merge)(const MergeParams&);
  void (*linear)(const LinearParams&);
};

Kernels kernels(bool accumulate_f64) {
  switch (accumulate_f64 ? Capability::Default : capability()) {
#ifdef GRALORA_HAVE_AVX512
    case Capability::Avx512: return {isa_avx512::forward, isa_avx512::backward, isa_avx512::merge, isa_avx512::linear};
#endif
#ifdef GRALORA_HAVE_AVX2
    case Capability::Avx2: return {isa_avx2::forward, isa_avx2::backward, isa_avx2::merge, isa_avx2::linear};
#endif
    default: return {isa_default::forward, isa_default::backward, isa_default::merge, isa_default::linear};
  }
}

}  // namespace

void forward(const ForwardParams& p) { kernels(p.accumulate_f64).forward(p); }
void backward(const BackwardParams& p) { kernels(p.accumulate_f64).backward(p); }
void merge(const MergeParams& p) { kernels(p.accumulate_f64).merge(p); }
void linear(const LinearParams& p) { kernels(p.accumulate_f64).linear(p); }

}  // namespace gralora::cpu
