// SPDX-License-Identifier: Apache-2.0
// The passes on tensor cores. Each kernel is chosen by the dtypes that it reads and writes, so x,
// y and the adapter may differ: under autocast, x or g is float32 beside a 16-bit base.
#pragma once

#include "dropout.cuh"
#include "kernels.cuh"

namespace gralora::cuda::tensor_cores {

template <class X, class P>
struct Pair {
  using Activations = X;
  using Parameters = P;
};

template <class F>
cudaError_t for_pair(DType x, DType adapter, F&& f) {
  const bool single = adapter == DType::f32;
  switch (x) {
    case DType::bf16: return single ? f(Pair<bf16, float>{}) : f(Pair<bf16, bf16>{});
    case DType::f16: return single ? f(Pair<__half, float>{}) : f(Pair<__half, __half>{});
    default:
      return single                   ? f(Pair<float, float>{})
             : adapter == DType::bf16 ? f(Pair<float, bf16>{})
                                      : f(Pair<float, __half>{});
  }
}

inline cudaError_t project(const Projection* projections, int count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const Projection& one = projections[0];
  if (count == 2 && one.x.dtype != projections[1].x.dtype) {
    const cudaError_t error = project(projections, 1, stream);
    return error != cudaSuccess ? error : project(projections + 1, 1, stream);
  }
  return for_pair(one.x.dtype, one.P.dtype, [&](auto pair) {
    using Types = decltype(pair);
    return cuda::project<typename Types::Activations, typename Types::Parameters>(projections, count, stream);
  });
}

inline cudaError_t expand(const Latents& latents, const Expansion& to, cudaStream_t stream) {
  return for_pair(to.y.dtype, to.Q.dtype, [&](auto pair) {
    using Types = decltype(pair);
    return cuda::expand<typename Types::Activations, typename Types::Parameters>(latents, to, stream);
  });
}

inline cudaError_t weight_gradient(const GradientSum* gradients, int count, int splits, cudaStream_t stream) {
  const DType x = gradients[0].x.dtype;
  if (count == 2 && x != gradients[1].x.dtype) {
    const cudaError_t error = weight_gradient(gradients, 1, splits, stream);
    return error != cudaSuccess ? error : weight_gradient(gradients + 1, 1, splits, stream);
  }
  return x == DType::bf16  ? cuda::weight_gradient<bf16>(gradients, count, splits, stream)
         : x == DType::f16 ? cuda::weight_gradient<__half>(gradients, count, splits, stream)
                           : cuda::weight_gradient<float>(gradients, count, splits, stream);
}

inline cudaError_t reduce(const GradientTotal (&totals)[2], DType adapter, const Shape& shape, int splits,
                          cudaStream_t stream) {
  return adapter == DType::bf16  ? cuda::reduce<bf16>(totals, shape, splits, stream)
         : adapter == DType::f16 ? cuda::reduce<__half>(totals, shape, splits, stream)
                                 : cuda::reduce<float>(totals, shape, splits, stream);
}

inline Latents partial_latents(const Shape& s, float* data, int splits, float* to_keep) {
  return {data, s.T, int(s.k), int(s.r), int(s.h), splits, to_keep};
}
inline Latents kept_latents(const Shape& s, const void* data) {
  return {static_cast<float*>(const_cast<void*>(data)), s.T, int(s.k), int(s.r), int(s.h), 0, nullptr};
}

// x to H
inline Projection from_x(const Shape& s, const Activation& x, const Adapter& a, const Latents& H,
                         const Dropout& dropout) {
  const int w = int(s.N / s.k);
  return {x, a.A, blocks_of_rows(transposed(a.A_general), w), H, w, keep_scale(dropout), mask_of(dropout, s.N)};
}

// project, expand
inline cudaError_t pass(const ForwardParams& p, const ForwardPlan& plan, float* workspace, cudaStream_t stream) {
  const Shape& s = p.shape;
  const int w = int(s.M / s.k);
  const Latents H = partial_latents(s, workspace, plan.splits, static_cast<float*>(p.u));
  const Projection from = from_x(s, p.x, p.adapter, H, p.dropout);
  const cudaError_t error = project(&from, 1, stream);
  if (error != cudaSuccess) return error;
  const Expansion to{transposed(p.adapter.B), blocks_of_rows(p.adapter.B_general, w), p.base, p.y, w, p.scaling, {}};
  return expand(H, to, stream);
}

// weight_gradient, reduce
inline cudaError_t gradients(const BackwardParams& p, const BackwardPlan& plan, const Latents& U, const Latents& dH,
                             float* sums_B, float* sums_A, cudaStream_t stream) {
  const Shape& s = p.shape;
  const int w_in = int(s.N / s.k), w_out = int(s.M / s.k);
  const GradientSum sums[2] = {
      {p.grad_y, U, w_out, plan.sums_B > 0 ? sums_B : nullptr, p.scaling, {}},
      {p.x, dH, w_in, plan.sums_A > 0 ? sums_A : nullptr, keep_scale(p.dropout), mask_of(p.dropout, s.N)}};
  const cudaError_t error = weight_gradient(sums, 2, plan.token_splits, stream);
  if (error != cudaSuccess) return error;
  const GradientTotal totals[2] = {
      {sums[0].sums, transposed(p.grad.B), blocks_of_rows(p.grad.B_general, w_out), w_out},
      {sums[1].sums, p.grad.A, transposed(blocks_of_columns(p.grad.A_general, w_in)), w_in}};
  return reduce(totals, p.adapter.A.dtype, s, plan.token_splits, stream);
}

// project, expand where dx is wanted, weight_gradient and reduce where a gradient is
inline cudaError_t pass(const BackwardParams& p, const BackwardPlan& plan, float* workspace, cudaStream_t stream) {
  const Shape& s = p.shape;
  const int w_in = int(s.N / s.k), w_out = int(s.M / s.k);
  float* const of_x = workspace + plan.from_g;
  float* const kept_dH = plan.dH > 0 ? of_x + plan.from_x : nullptr;
  float* const sums_B = of_x + plan.from_x + plan.dH;
  const Latents dH = partial_latents(s, workspace, plan.splits, kept_dH);
  const Latents U = p.u != nullptr ? kept_latents(s, p.u) : partial_latents(s, of_x, plan.splits, nullptr);

  Projection projections[2];
  int count = 0;
  if (plan.need_dH)
    projections[count++] = {
        p.grad_y, transposed(p.adapter.B), blocks_of_rows(p.adapter.B_general, w_out), dH, w_out, p.scaling, {}};
  if (plan.from_x > 0) projections[count++] = from_x(s, p.x, p.adapter, U, p.dropout);
  cudaError_t error = project(projections, count, stream);
  if (error != cudaSuccess) return error;

  if (p.grad_x.data != nullptr)
    error = expand(
        dH,
        {p.adapter.A, transposed(blocks_of_columns(p.adapter.A_general, w_in)),
         p.add_to_grad_x ? p.grad_x : Activation{}, p.grad_x, w_in, keep_scale(p.dropout), mask_of(p.dropout, s.N)},
        stream);
  if (error != cudaSuccess || !plan.need_gradients) return error;
  return gradients(p, plan, U, kept_dH != nullptr ? kept_latents(s, kept_dH) : dH, sums_B, sums_B + plan.sums_B,
                   stream);
}

// W with columns of stride 1
inline cudaError_t merge(const MergeParams& p, cudaStream_t stream) {
  return for_pair(p.weight.dtype, p.adapter.A.dtype, [&](auto pair) {
    using Types = decltype(pair);
    return cuda::merge<typename Types::Activations, typename Types::Parameters>(p, stream);
  });
}

}  // namespace gralora::cuda::tensor_cores
