// SPDX-License-Identifier: Apache-2.0
// Floats as sums of bfloat16 pieces, so that one tensor-core instruction serves every dtype.
//
//   x = p_0 + p_1 + p_2 (+ an error)
//   p_0 = bf16(x), p_1 = bf16(x - p_0), p_2 = bf16(x - p_0 - p_1)
//
// A product of two such sums takes the pairs (i, j) with i + j < level. A bfloat16 is one piece, a
// half two, a float three: each of them exactly (8 bits a piece), but for parts of a float below
// bfloat16's least number. What is left out of a product is 2^(-8 level) of it: below the rounding
// of float sums for level = 3, below that of a 16-bit result for level = 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "intrinsics.cuh"

namespace gralora::cuda {

using bf16 = __nv_bfloat16;

template <class T>
constexpr int kPieces = sizeof(T) == 4 ? 3 : 2;
template <>
inline constexpr int kPieces<bf16> = 1;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double from_float<double>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// The pieces of x. Of an infinity or a NaN the first piece holds it and the others are zero: their
// difference would be NaN.
template <int count>
__device__ __forceinline__ void split_float(float x, bf16 (&piece)[count]) {
#pragma unroll
  for (int i = 0; i < count; i++) {
    piece[i] = __float2bfloat16_rn(x);
    const float rest = x - __bfloat162float(piece[i]);
    x = rest - rest == 0.0f ? rest : 0.0f;
  }
}

// Two neighbours as the words of a fragment: the lower index in the low half.
template <int count>
__device__ __forceinline__ void split_pair(float low, float high, uint32_t (&word)[count]) {
  bf16 a[count], b[count];
  split_float(low, a), split_float(high, b);
#pragma unroll
  for (int i = 0; i < count; i++)
    word[i] = uint32_t(__bfloat16_as_ushort(a[i])) | uint32_t(__bfloat16_as_ushort(b[i])) << 16;
}

constexpr int kFloatLevel = 3;

// d += a b over the pairs of pieces that count: a[i] is m16k16, b[j] is k16n8.
template <int level, int pieces_a, int pieces_b>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[pieces_a][4],
                                         const uint32_t (&b)[pieces_b][2]) {
  // The least first: what they add up to is not lost against the first pair.
#pragma unroll
  for (int sum = level - 1; sum >= 0; sum--)
#pragma unroll
    for (int i = 0; i < pieces_a; i++)
      if (sum - i >= 0 && sum - i < pieces_b) mma_m16n8k16(d, a[i], b[sum - i]);
}

// Tensor cores cut what they add instead of rounding it, so a long sum drifts towards zero. A
// stretch of 32 to 64 terms is therefore added to a total that rounds to nearest (Ootomo and
// Yokota, "Recovering single precision accuracy from Tensor Cores", 2022).
__device__ __forceinline__ void promote(float (&total)[4], const float (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) total[i] += sum[i];
}

}  // namespace gralora::cuda
