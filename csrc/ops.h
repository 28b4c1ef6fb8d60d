// SPDX-License-Identifier: Apache-2.0
// The ops, each: check, allocate, fill Params, launch. Shapes as in gralora.h.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "params.h"

namespace gralora {

// (y, u, kept): y [..., M] in base's dtype and strides; for backward u [T, k*r + h] in dtype_of_u,
// or [0, k*r + h]: see keeps_u (params.h); and the mask of dropout as bits [T, N/8], or [0, N/8]:
// see keeps_mask.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ForwardResult forward_kernel(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A, const at::Tensor& B,
                             const OptionalTensor& A_general, const OptionalTensor& B_general,
                             const OptionalTensor& seed, double scaling, double dropout_p);

// The same with y in base's memory.
ForwardResult forward_into_kernel(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A, const at::Tensor& B,
                                  const OptionalTensor& A_general, const OptionalTensor& B_general,
                                  const OptionalTensor& seed, double scaling, double dropout_p);

// (dx, dA, dB, dA_general, dB_general); those not in `needs` are empty tensors of one dimension.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_kernel(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& u, const at::Tensor& kept, const at::Tensor& A,
    const at::Tensor& B, const OptionalTensor& A_general, const OptionalTensor& B_general, const OptionalTensor& seed,
    double scaling, double dropout_p, std::array<bool, 5> needs);
// The same without checks, with dx written, or added, to a tensor that is given; undefined: not
// wanted
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_to(
    const at::Tensor& dx, bool add, const Shape& shape, const at::Tensor& grad, const at::Tensor& x,
    const at::Tensor& u, const at::Tensor& kept, const at::Tensor& A, const at::Tensor& B,
    const OptionalTensor& A_general, const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
    double dropout_p, std::array<bool, 5> needs);

void merge_kernel(at::Tensor weight, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                  const OptionalTensor& B_general, double scaling, bool fan_in_fan_out);

at::Tensor delta_weight_kernel(const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                               const OptionalTensor& B_general, double scaling, bool fan_in_fan_out);

// Several adapters merged one after the other, with codes that lead back to the bits of before
// (coded_ops.cpp), on the CPU. adapters: A, B, A_general and B_general of each. `to` is written
// and may be weight. facts: whether it is done, the checksums of before and after, the number of
// exceptions, the first adapter after which a weight is not finite.
void merge_coded_kernel(const at::Tensor& weight, at::Tensor to, const c10::List<OptionalTensor>& adapters,
                        at::ArrayRef<double> scalings, bool fan_in_fan_out, at::Tensor codes, at::Tensor places,
                        at::Tensor values, at::Tensor facts);
// Returns what checksums_kernel says of the weight as that of before.
int64_t unmerge_coded_kernel(at::Tensor weight, const c10::List<OptionalTensor>& adapters,
                             at::ArrayRef<double> scalings, bool fan_in_fan_out, const at::Tensor& codes,
                             const at::Tensor& places, const at::Tensor& values);
// Of a weight: what facts would have if it were the weight of before, and that of after
std::tuple<int64_t, int64_t> checksums_kernel(const at::Tensor& weight, bool fan_in_fan_out);
// Memory for the codes of a weight, from the pool of results
at::Tensor empty_codes_kernel(const at::Tensor& weight);

// A layer whose weight is frozen, with its adapter (linear_ops.cpp). own_gemm: y = x
// (W + dW)^T + bias in one product of ours, with dropout y = x W^T + bias and then the path of x;
// else so by torch's GEMM, in any dtype, with dropout or without. Results as above, with u
// [0, k*r + h] where it is one product. own_gemm is for the CPU alone.
ForwardResult linear_kernel(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                            const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                            const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
                            double dropout_p, bool own_gemm);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_backward_kernel(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& u, const at::Tensor& kept, const at::Tensor& weight,
    const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general, const OptionalTensor& B_general,
    const OptionalTensor& seed, double scaling, double dropout_p, bool own_gemm, std::array<bool, 5> needs);

// The autograd kernels of the forward ops (autograd.cpp).
ForwardResult forward_autograd(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A, const at::Tensor& B,
                               const OptionalTensor& A_general, const OptionalTensor& B_general,
                               const OptionalTensor& seed, double scaling, double dropout_p);
ForwardResult forward_into_autograd(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A,
                                    const at::Tensor& B, const OptionalTensor& A_general,
                                    const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
                                    double dropout_p);
ForwardResult linear_autograd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                              const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
                              double dropout_p, bool own_gemm);

}  // namespace gralora
