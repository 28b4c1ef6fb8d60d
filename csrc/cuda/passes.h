// SPDX-License-Identifier: Apache-2.0
// The passes on tensor cores for one pair of dtypes, X of x, base and y (or W), P of the adapter.
// Defined in tensor_cores.cuh, instantiated in float32.cu, bfloat16.cu and float16.cu. Activations
// have one leading dimension (or none) and columns of stride 1, and so has W.
#pragma once

#include <cuda_runtime.h>

#include "plan.h"

namespace gralora::cuda {

// fused_forward; or project, expand
template <class X, class P>
cudaError_t pass(const ForwardParams& p, const ForwardPlan& plan, float* workspace, cudaStream_t stream);

// project, expand, weight_gradient, reduce
template <class X, class P>
cudaError_t pass(const BackwardParams& p, const BackwardPlan& plan, float* workspace, cudaStream_t stream);

template <class W, class P>
cudaError_t merge(const MergeParams& p, cudaStream_t stream);

#define GRALORA_INSTANTIATE(X, P)                                                                    \
  template cudaError_t pass<X, P>(const ForwardParams&, const ForwardPlan&, float*, cudaStream_t);   \
  template cudaError_t pass<X, P>(const BackwardParams&, const BackwardPlan&, float*, cudaStream_t); \
  template cudaError_t merge<X, P>(const MergeParams&, cudaStream_t);

}  // namespace gralora::cuda
