// SPDX-License-Identifier: Apache-2.0
// All products of this instruction set, and the one place that chooses among them, as the plan
// says.
#pragma once

#include "product_amx.h"

namespace gralora::cpu::GRALORA_ISA {

#ifndef __AVX512F__
struct Pairs;
constexpr bool kHasPairs = false;
#else
constexpr bool kHasPairs = true;
#endif
#if !defined(__AVX512F__) || !defined(GRALORA_HAVE_AMX)
template <class Latent>
struct Amx;
constexpr bool kHasAmx = false;
#else
constexpr bool kHasAmx = true;
#endif

// Executes Pass<Product>{p, plan}, or for few tokens Few<Acc>{p, plan}. A plan never names a
// product that this instruction set lacks.
template <template <class> class Pass, template <class> class Few, class Params, class Plan>
void run_pass(const Params& p, const Plan& plan) {
  const bool few = plan.schedule == Schedule::FewTokens;
  switch (plan.product) {
    case Product::Float32: return few ? Few<float>{p, plan}.run() : Pass<Fp32<float>>{p, plan}.run();
    case Product::Float64:
      if constexpr (kHasFloat64) few ? Few<double>{p, plan}.run() : Pass<Fp32<double>>{p, plan}.run();
      return;
    case Product::Bf16Pairs:
      if constexpr (kHasPairs) Pass<Pairs>{p, plan}.run();
      return;
    case Product::Bf16Amx:
      if constexpr (kHasAmx) Pass<Amx<bf16>>{p, plan}.run();
      return;
    case Product::SplitAmx:
      if constexpr (kHasAmx) Pass<Amx<float>>{p, plan}.run();
      return;
  }
}

}  // namespace gralora::cpu::GRALORA_ISA
