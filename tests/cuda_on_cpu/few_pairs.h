// SPDX-License-Identifier: Apache-2.0
// The kernels on tensor cores for two pairs of dtypes alone, where a build serves one short run.
#pragma once

#include "tensor_cores.cuh"

namespace gralora::cuda {

GRALORA_INSTANTIATE(bf16, float)
GRALORA_INSTANTIATE(float, float)

#define GRALORA_LEAVE_OUT(X, P)                                                              \
  template <>                                                                                \
  cudaError_t pass<X, P>(const ForwardParams&, const ForwardPlan&, float*, cudaStream_t) {   \
    return cudaErrorNotSupported;                                                            \
  }                                                                                          \
  template <>                                                                                \
  cudaError_t pass<X, P>(const BackwardParams&, const BackwardPlan&, float*, cudaStream_t) { \
    return cudaErrorNotSupported;                                                            \
  }                                                                                          \
  template <>                                                                                \
  cudaError_t merge<X, P>(const MergeParams&, cudaStream_t) {                                \
    return cudaErrorNotSupported;                                                            \
  }
GRALORA_LEAVE_OUT(bf16, bf16)
GRALORA_LEAVE_OUT(__half, float)
GRALORA_LEAVE_OUT(__half, __half)

}  // namespace gralora::cuda
