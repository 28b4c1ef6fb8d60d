// SPDX-License-Identifier: Apache-2.0
// Each pass is planned, then goes to the kernels that were compiled for the instruction set in
// use. Float64 goes to the portable kernels, the only ones that have it.
#include "../gralora.h"
#include "machine.h"
#include "plan.h"

namespace gralora::cpu {

#define GRALORA_DECLARE_KERNELS(isa)                                \
  namespace isa {                                                   \
  void forward(const ForwardParams& p, const ForwardPlan& plan);    \
  void backward(const BackwardParams& p, const BackwardPlan& plan); \
  void merge(const MergeParams& p, const MergePlan& plan);          \
  void linear(const LinearParams& p, const LinearPlan& plan);       \
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
  void (*forward)(const ForwardParams&, const ForwardPlan&);
  void (*backward)(const BackwardParams&, const BackwardPlan&);
  void (*merge)(const MergeParams&, const MergePlan&);
  void (*linear)(const LinearParams&, const LinearPlan&);
};

Kernels kernels(bool accumulate_f64) {
  switch (accumulate_f64 ? Capability::Default : machine().capability) {
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

void forward(const ForwardParams& p) { kernels(p.accumulate_f64).forward(p, plan(p, machine())); }
void backward(const BackwardParams& p) { kernels(p.accumulate_f64).backward(p, plan(p, machine())); }
void merge(const MergeParams& p) { kernels(p.accumulate_f64).merge(p, plan(p, machine())); }
void linear(const LinearParams& p) { kernels(p.accumulate_f64).linear(p, plan(p, machine())); }

}  // namespace gralora::cpu
