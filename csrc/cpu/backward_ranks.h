// SPDX-License-Identifier: Apache-2.0
// The ranks of backward [tokens, k*r + h]: dH of a wave of tokens, and U, which forward kept or
// which is made again for a wave. U of bf16 is always kept.
#pragma once

#include "pieces.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc, class Product>
struct BackwardRanks {
  static constexpr bool kTiles = kByTiles<Product>, kPairs = Product::kTerms == 2 && !kTiles;
  const BackwardParams& p;
  const int64_t row = p.shape.k * p.shape.r + p.shape.h;
  const bool rounded = kPairs || (kTiles && p.u_bf16);  // dH is bf16; and so is U
  Acc *dH = nullptr, *remade = nullptr;                 // null: not wanted

  // f(dH from row `first` of the wave on, or null)
  template <class F>
  void with_dH(int64_t first, F&& f) const {
    const int64_t offset = dH == nullptr ? 0 : first * row;
    if constexpr (Product::kTerms == 2) {
      if (rounded) return f(reinterpret_cast<bf16*>(dH) + offset);
    }
    if constexpr (!kPairs) f(dH + offset);
  }

  // f(U of the tokens from t0 on, which are row `first` of the wave)
  template <class F>
  void with_U(int64_t t0, int64_t first, F&& f) const {
    if (p.u_bf16) return f(static_cast<const bf16*>(p.u) + t0 * row);
    if constexpr (!kPairs) f(remade != nullptr ? remade + first * row : static_cast<const Acc*>(p.u) + t0 * row);
  }

  // Whether dx is made of dH as it lies
  bool dH_in_place() const { return !kTiles || (rounded && in_whole_steps(p.shape)); }
};

}  // namespace gralora::cpu::GRALORA_ISA
