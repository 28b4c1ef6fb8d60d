// SPDX-License-Identifier: Apache-2.0
// Each pass is planned, then goes to the kernels that were compiled for the instruction set in
// use. Float64 goes to the portable kernels, the only ones that have it.
#include <vector>

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
  void merge_coded(const CodedParams& p, const CodedPlan& plan);    \
  void unmerge_coded(const CodedParams& p, const CodedPlan& plan);  \
  void checksums(const CodedParams& p, const CodedPlan& plan);      \
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
  void (*merge_coded)(const CodedParams&, const CodedPlan&);
  void (*unmerge_coded)(const CodedParams&, const CodedPlan&);
  void (*checksums)(const CodedParams&, const CodedPlan&);
};

#define GRALORA_KERNELS(isa) \
  {isa::forward, isa::backward, isa::merge, isa::linear, isa::merge_coded, isa::unmerge_coded, isa::checksums}

Kernels kernels(bool accumulate_f64) {
  switch (accumulate_f64 ? Capability::Default : machine().capability) {
#ifdef GRALORA_HAVE_AVX512
    case Capability::Avx512: return GRALORA_KERNELS(isa_avx512);
#endif
#ifdef GRALORA_HAVE_AVX2
    case Capability::Avx2: return GRALORA_KERNELS(isa_avx2);
#endif
    default: return GRALORA_KERNELS(isa_default);
  }
}

// Calls run(kernels, plan) with the plan of a merge with codes.
template <class Run>
void with_plan(const CodedParams& p, const Run& run) {
  CodedPlan whole = plan(p, machine());
  std::vector<MergePlan> adapters;
  for (int64_t i = 0; i < p.count; i++) adapters.push_back(plan_in_tile(p, p.adapters[i], whole, machine()));
  whole.adapters = adapters.data();
  run(kernels(p.weight.dtype == DType::f64), whole);
}

}  // namespace

void forward(const ForwardParams& p) { kernels(p.accumulate_f64).forward(p, plan(p, machine())); }
void backward(const BackwardParams& p) { kernels(p.accumulate_f64).backward(p, plan(p, machine())); }
void merge(const MergeParams& p) { kernels(p.accumulate_f64).merge(p, plan(p, machine())); }
void linear(const LinearParams& p) { kernels(p.accumulate_f64).linear(p, plan(p, machine())); }
void merge_coded(const CodedParams& p) {
  with_plan(p, [&](const Kernels& of, const CodedPlan& plan) { of.merge_coded(p, plan); });
}
void unmerge_coded(const CodedParams& p) {
  with_plan(p, [&](const Kernels& of, const CodedPlan& plan) { of.unmerge_coded(p, plan); });
}
void checksums(const CodedParams& p) {
  with_plan(p, [&](const Kernels& of, const CodedPlan& plan) { of.checksums(p, plan); });
}

}  // namespace gralora::cpu
