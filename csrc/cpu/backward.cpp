// backward, with g = dL/dy:
//   dU_j = s g_j B_j^T and s g Bg, stored as dH (project);   dx = (dH A^T + s g Bg Ag) * dropout factor (expand)
//   dB_j = s U_j^T g_j, dBg^T = s (x' Ag^T)^T g;   dA_n = x'_n^T dH_n, dAg = (s g Bg)^T x'   (weight_gradient)
#include "expand.h"
#include "project.h"
#include "weight_gradient.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc>
void run(const BackwardParams& p) {
  const auto [T, N, M, k, r, h] = p.shape;
  const Mask no_mask{Dropout{}}, mask{p.dropout};
  const Adapter& grad = p.grad;

  if (grad.B.data != nullptr || grad.B_general.data != nullptr)
    WeightGradient<Acc>{T,
                        M,
                        k,
                        r,
                        h,
                        static_cast<const Acc*>(p.u),
                        p.grad_y,
                        no_mask,
                        Acc(p.scaling),
                        grad.B,
                        transposed(blocks_of_rows(grad.B_general, M / k))}
        .run(p.threads);

  const bool want_A = grad.A.data != nullptr || grad.A_general.data != nullptr;
  if (!want_A && p.grad_x.data == nullptr) return;

  Panels<Acc> Bt, Bg;
  Bt.prepare(transposed(p.adapter.B), k, M / k, r, T, p.threads);
  if (h > 0) Bg.prepare(blocks_of_rows(p.adapter.B_general, M / k), k, M / k, h, T, p.threads);
  Buffer<Acc> dH(T * (k * r + h));
  Project<Acc>{T, M, k, r, h, p.grad_y, no_mask, Bt, Bg, Acc(p.scaling), dH.get()}.run(p.threads);

  if (want_A)
    WeightGradient<Acc>{
        T, N, k, r, h, dH.get(), p.x, mask, Acc(1), transposed(grad.A), blocks_of_columns(grad.A_general, N / k)}
        .run(p.threads);

  if (p.grad_x.data != nullptr) {
    Panels<Acc> At, Ag;
    At.prepare(transposed(p.adapter.A), k, r, N / k, T, p.threads);
    if (h > 0) Ag.prepare(blocks_of_columns(p.adapter.A_general, N / k), k, h, N / k, T, p.threads);
    Expand<Acc>{T, N, k, r, h, dH.get(), At, Ag, Acc(1), mask, Rows{}, p.grad_x}.run(p.threads);
  }
}

}  // namespace

void backward(const BackwardParams& p) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p);
  }
  run<float>(p);
}

}  // namespace gralora::cpu::GRALORA_ISA
