// SPDX-License-Identifier: Apache-2.0
// The kernels on tensor cores for two pairs of dtypes alone, where a build serves one short run.
#pragma once

#include "launchers.cuh"

namespace gralora::cuda {

GRALORA_INSTANTIATE(bf16, float)
GRALORA_INSTANTIATE(float, float)
GRALORA_INSTANTIATE_GRADIENTS(bf16)
GRALORA_INSTANTIATE_GRADIENTS(float)

#define GRALORA_LEAVE_OUT(X, P)                                              \
  template <>                                                                \
  cudaError_t project<X, P>(const Projection*, int, cudaStream_t) {          \
    return cudaErrorNotSupported;                                            \
  }                                                                          \
  template <>                                                                \
  cudaError_t expand<X, P>(const Latents&, const Expansion&, cudaStream_t) { \
    return cudaErrorNotSupported;                                            \
  }                                                                          \
  template <>                                                                \
  cudaError_t merge<X, P>(const MergeParams&, cudaStream_t) {                \
    return cudaErrorNotSupported;                                            \
  }
GRALORA_LEAVE_OUT(float, bf16)
GRALORA_LEAVE_OUT(float, __half)
GRALORA_LEAVE_OUT(bf16, bf16)
GRALORA_LEAVE_OUT(__half, float)
GRALORA_LEAVE_OUT(__half, __half)

template <>
cudaError_t weight_gradient<__half>(const GradientSum*, int, int, cudaStream_t) {
  return cudaErrorNotSupported;
}
template <>
cudaError_t reduce<__half>(const GradientTotal (&)[2], const Shape&, int, cudaStream_t) {
  return cudaErrorNotSupported;
}

}  // namespace gralora::cuda
