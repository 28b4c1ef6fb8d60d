// SPDX-License-Identifier: Apache-2.0
// The tensor-core kernels as host code calls them: what a launch works on, in gralora.h's structs,
// and a launcher for each kernel by the dtypes that it depends on. Defined in launchers.cuh,
// instantiated in float32.cu, bfloat16.cu and float16.cu. Activations have one leading dimension
// (or none) and columns of stride 1, and so has W.
#pragma once

#include "latents.cuh"

namespace gralora::cuda {

// From x, of width k*w, to latents; P [k, w, r], G [k, w, h]
struct Projection {
  Activation x;
  Param P, G;
  Latents latents;
  int w;
  double scale;
  Mask mask;
};
// `count` of them, of the same latents in number and splits
template <class X, class P>
cudaError_t project(const Projection* projections, int count, cudaStream_t stream);

// From latents to y, of width k*w, added to base where there is one; Q [k, w, r], G [k, w, h]
struct Expansion {
  Param Q, G;
  Activation base, y;
  int w;
  double scale;
  Mask mask;
};
template <class Y, class P>
cudaError_t expand(const Latents& latents, const Expansion& to, cudaStream_t stream);

// The sums of a weight gradient; sums == nullptr: not wanted
struct GradientSum {
  Activation x;
  Latents latents;
  int w;
  float* sums;
  double scale;
  Mask mask;
};
// `count` of them, of the same latents in number
template <class X>
cudaError_t weight_gradient(const GradientSum* gradients, int count, int splits, cudaStream_t stream);

// A gradient [k, w, r] and that of the general part [k, w, h], from sums over tokens
struct GradientTotal {
  const float* sums;
  Param block, general;
  int w;
};
template <class P>
cudaError_t reduce(const GradientTotal (&totals)[2], const Shape& shape, int splits, cudaStream_t stream);

// W is [M, N] with rows of stride weight.row_stride.
template <class W, class P>
cudaError_t merge(const MergeParams& p, cudaStream_t stream);

#define GRALORA_INSTANTIATE(X, P)                                                    \
  template cudaError_t project<X, P>(const Projection*, int, cudaStream_t);          \
  template cudaError_t expand<X, P>(const Latents&, const Expansion&, cudaStream_t); \
  template cudaError_t merge<X, P>(const MergeParams&, cudaStream_t);
#define GRALORA_INSTANTIATE_GRADIENTS(X)                                               \
  template cudaError_t weight_gradient<X>(const GradientSum*, int, int, cudaStream_t); \
  template cudaError_t reduce<X>(const GradientTotal(&)[2], const Shape&, int, cudaStream_t);

}  // namespace gralora::cuda
