// forward: U = exchange(x' A) and x' Ag^T (project), then y = base + s (U B + x' Ag^T Bg^T) (expand).
#include "expand.h"
#include "project.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc>
void run(const ForwardParams& p) {
  const auto [T, N, M, k, r, h] = p.shape;
  Panels<Acc> A, Ag, B, Bg;
  A.prepare(p.adapter.A, k, N / k, r, T, p.threads);
  B.prepare(p.adapter.B, k, r, M / k, T, p.threads);
  if (h > 0) {
    Ag.prepare(blocks_of_rows(transposed(p.adapter.A_general), N / k), k, N / k, h, T, p.threads);
    Bg.prepare(transposed(blocks_of_rows(p.adapter.B_general, M / k)), k, h, M / k, T, p.threads);
  }
  Acc* u = static_cast<Acc*>(p.u);
  Project<Acc>{T, N, k, r, h, p.x, Mask(p.dropout), A, Ag, Acc(1), u}.run(p.threads);
  Expand<Acc>{T, M, k, r, h, u, B, Bg, Acc(p.scaling), Mask(Dropout{}), p.base, p.y}.run(p.threads);
}

}  // namespace

void forward(const ForwardParams& p) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p);
  }
  run<float>(p);
}

}  // namespace gralora::cpu::GRALORA_ISA
