// SPDX-License-Identifier: Apache-2.0
// Argument checks, one function per op, for all devices. They name the argument, what was expected
// and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>

#include "gralora.h"
#include "overlap.h"
#include "params.h"

namespace gralora {

inline bool is_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

// torch takes None for any tensor.
inline void check_given(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.defined(), "gralora_ext: ", name, " must be a tensor, but is None");
}

inline void check_tensor(const at::Tensor& tensor, const char* name, const at::Device& device) {
  check_given(tensor, name);
  TORCH_CHECK_TYPE(is_floating(tensor.scalar_type()), "gralora_ext: ", name,
                   " must be float32, bfloat16, float16 or float64, but is ", tensor.scalar_type());
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, "gralora_ext: ", name,
                   " must be a dense tensor, but its layout is ", tensor.layout());
  TORCH_CHECK_VALUE(tensor.device() == device, "gralora_ext: all tensors must be on one device, but ", name, " is on ",
                    tensor.device(), " where ", device, " was expected");
}

// Checks the parameters among themselves and returns their sizes (T stays 0).
inline Shape check_adapter(const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                           const OptionalTensor& B_general, double scaling) {
  check_given(A, "A");
  check_tensor(A, "A", A.device());
  check_tensor(B, "B", A.device());
  TORCH_CHECK_VALUE(A.dim() == 3, "gralora_ext: A must be [k, N/k, r], but has shape ", A.sizes());
  TORCH_CHECK_VALUE(B.dim() == 3, "gralora_ext: B must be [k, r, M/k], but has shape ", B.sizes());
  Shape s;
  s.k = A.size(0), s.N = A.size(0) * A.size(1), s.r = A.size(2), s.M = B.size(0) * B.size(2);
  TORCH_CHECK_VALUE(A.numel() > 0, "gralora_ext: A must have k, N/k and r of at least 1, but has shape ", A.sizes());
  TORCH_CHECK_VALUE(s.r % s.k == 0, "gralora_ext: the rank r of A must be divisible by k, but r is ", s.r, " and k is ",
                    s.k);
  TORCH_CHECK_VALUE(B.size(0) == s.k && B.size(1) == s.r && B.size(2) > 0, "gralora_ext: B must be [k, r, M/k] = [",
                    s.k, ", ", s.r, ", M/k] to go with A of shape ", A.sizes(), ", but has shape ", B.sizes());
  TORCH_CHECK_TYPE(B.scalar_type() == A.scalar_type(), "gralora_ext: B must have A's dtype ", A.scalar_type(),
                   ", but is ", B.scalar_type());
  TORCH_CHECK_VALUE(A_general.has_value() == B_general.has_value(),
                    "gralora_ext: A_general and B_general must be given ", "together, but ",
                    A_general.has_value() ? "B_general" : "A_general", " is None");
  if (A_general.has_value()) {
    check_tensor(*A_general, "A_general", A.device());
    check_tensor(*B_general, "B_general", A.device());
    TORCH_CHECK_VALUE(A_general->dim() == 2 && A_general->size(0) > 0 && A_general->size(1) == s.N,
                      "gralora_ext: A_general must be [h, N] = [h, ", s.N, "], but has shape ", A_general->sizes());
    s.h = A_general->size(0);
    TORCH_CHECK_VALUE(B_general->dim() == 2 && B_general->size(0) == s.M && B_general->size(1) == s.h,
                      "gralora_ext: B_general must be [M, h] = [", s.M, ", ", s.h, "], but has shape ",
                      B_general->sizes());
    TORCH_CHECK_TYPE(A_general->scalar_type() == A.scalar_type() && B_general->scalar_type() == A.scalar_type(),
                     "gralora_ext: A_general and B_general must have A's dtype ", A.scalar_type(), ", but are ",
                     A_general->scalar_type(), " and ", B_general->scalar_type());
  }
  TORCH_CHECK_VALUE(std::isfinite(scaling), "gralora_ext: scaling must be finite, but is ", scaling);
  return s;
}

inline void check_activation(const at::Tensor& tensor, const char* name, int64_t width, const char* width_name,
                             const at::Device& device) {
  check_tensor(tensor, name, device);
  TORCH_CHECK_VALUE(tensor.dim() >= 1 && tensor.size(-1) == width, "gralora_ext: ", name, " must be [..., ", width_name,
                    "] = [..., ", width, "] to go with A and B, but has shape ", tensor.sizes());
}

inline int64_t leading_size(const at::Tensor& tensor) {
  int64_t T = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); d++) T *= tensor.size(d);
  return T;
}

inline void check_dropout(double p, const OptionalTensor& seed, const at::Device& device) {
  TORCH_CHECK_VALUE(p >= 0.0 && p < 1.0, "gralora_ext: dropout_p must be in [0, 1), but is ", p);
  if (p == 0.0) return;
  TORCH_CHECK_VALUE(seed.has_value(), "gralora_ext: seed must be given where dropout_p is not 0, but is None");
  TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong, "gralora_ext: seed must be int64, but is ", seed->scalar_type());
  TORCH_CHECK_VALUE(seed->numel() == 1, "gralora_ext: seed must have one element, but has shape ", seed->sizes());
  TORCH_CHECK_VALUE(seed->device() == device, "gralora_ext: seed must be on ", device, ", but is on ", seed->device());
}

inline Shape check_forward(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A, const at::Tensor& B,
                           const OptionalTensor& A_general, const OptionalTensor& B_general, const OptionalTensor& seed,
                           double scaling, double dropout_p) {
  Shape s = check_adapter(A, B, A_general, B_general, scaling);
  check_activation(x, "x", s.N, "N", A.device());
  check_activation(base, "base", s.M, "M", A.device());
  TORCH_CHECK_VALUE(x.sizes().slice(0, x.dim() - 1) == base.sizes().slice(0, base.dim() - 1),
                    "gralora_ext: base must have x's leading dimensions, but x has shape ", x.sizes(),
                    " and base has shape ", base.sizes());
  check_dropout(dropout_p, seed, A.device());
  s.T = leading_size(x);
  return s;
}

// A tensor that is written in place, by what is read meanwhile
inline void check_apart(const at::Tensor& written, const char* name, const at::Tensor& read, const char* read_name) {
  TORCH_CHECK_VALUE(!share_memory(written, read), "gralora_ext: ", name, " must not share ", read_name,
                    "'s memory where it is written in place, nor be woven into it: ", name, " has shape ",
                    written.sizes(), " and strides ", written.strides(), ", ", read_name, " has shape ", read.sizes(),
                    " and strides ", read.strides());
}
inline void check_written(const at::Tensor& written, const char* name, const at::Tensor& A, const at::Tensor& B,
                          const OptionalTensor& A_general, const OptionalTensor& B_general) {
  if (written.has_storage()) {  // a lazy clone gets memory of its own, which torch takes from the current device
    const c10::DeviceGuard guard(written.device());
    (void)written.mutable_data_ptr();
  }
  TORCH_CHECK_VALUE(!overlaps_itself(written), "gralora_ext: ", name,
                    " must not overlap itself where it is written in place: no two elements may share memory, but it "
                    "has shape ",
                    written.sizes(), " and strides ", written.strides());
  check_apart(written, name, A, "A");
  check_apart(written, name, B, "B");
  if (!A_general.has_value()) return;
  check_apart(written, name, *A_general, "A_general");
  check_apart(written, name, *B_general, "B_general");
}

// Where y is written into base
inline Shape check_forward_into(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A, const at::Tensor& B,
                                const OptionalTensor& A_general, const OptionalTensor& B_general,
                                const OptionalTensor& seed, double scaling, double dropout_p) {
  const Shape s = check_forward(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
  check_written(base, "base", A, B, A_general, B_general);
  check_apart(base, "base", x, "x");
  return s;
}

// one_product: as for keeps_u
inline Shape check_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& u, const at::Tensor& kept,
                            const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                            const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
                            double dropout_p, bool one_product = false) {
  Shape s = check_adapter(A, B, A_general, B_general, scaling);
  check_activation(grad, "grad", s.M, "M", A.device());
  check_activation(x, "x", s.N, "N", A.device());
  check_dropout(dropout_p, seed, A.device());
  s.T = leading_size(x);
  TORCH_CHECK_VALUE(grad.sizes().slice(0, grad.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                    "gralora_ext: grad must have x's leading dimensions, but x has shape ", x.sizes(),
                    " and grad has shape ", grad.sizes());
  check_given(u, "u"), check_given(kept, "kept");
  const int64_t ranks = s.k * s.r + s.h;
  const bool may_be_empty = !keeps_u(x, A, s, one_product);
  TORCH_CHECK_VALUE(
      u.dim() == 2 && (u.size(0) == s.T || (u.size(0) == 0 && may_be_empty)) && u.size(1) == ranks && u.is_contiguous(),
      "gralora_ext: u must be what the forward op returned, contiguous [", s.T, ", ", ranks, "]",
      may_be_empty ? " or with no rows" : "", ", but has shape ", u.sizes());
  TORCH_CHECK_VALUE(kept.dim() == 2 && (kept.size(0) == 0 || (kept.size(0) == s.T && mask_fills_bytes(s))) &&
                        kept.size(1) == s.N / 8 && kept.is_contiguous(),
                    "gralora_ext: kept must be what the forward op returned, contiguous [", s.T, ", ", s.N / 8,
                    "] or [0, ", s.N / 8, "], but has shape ", kept.sizes());
  TORCH_CHECK_TYPE(kept.scalar_type() == at::kByte, "gralora_ext: kept must be uint8, but is ", kept.scalar_type());
  TORCH_CHECK_VALUE(kept.device() == A.device(), "gralora_ext: kept must be on ", A.device(), ", but is on ",
                    kept.device());
  TORCH_CHECK_VALUE(u.device() == A.device(), "gralora_ext: u must be on ", A.device(), ", but is on ", u.device());
  const bool f64 =
      grad.scalar_type() == at::kDouble || x.scalar_type() == at::kDouble || A.scalar_type() == at::kDouble;
  const bool all_bf16 = keeps_bf16_u({&grad, &x, &A});
  TORCH_CHECK_TYPE(u.scalar_type() == at::kDouble || (u.scalar_type() == at::kFloat && !f64) ||
                       (u.scalar_type() == at::kBFloat16 && all_bf16),
                   "gralora_ext: u must be as the forward op returned it, ",
                   f64        ? "float64"
                   : all_bf16 ? "bfloat16, float32 or float64"
                              : "float32 or float64",
                   ", but is ", u.scalar_type());
  return s;
}

// with own_gemm on the CPU, x and weight in the accumulation type
inline Shape check_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                          const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                          const OptionalTensor& B_general, const OptionalTensor& seed, double scaling, double dropout_p,
                          bool own_gemm) {
  Shape s = check_adapter(A, B, A_general, B_general, scaling);
  check_activation(x, "x", s.N, "N", A.device());
  TORCH_CHECK_VALUE(!own_gemm || x.is_cpu(), "gralora_ext: with own_gemm all tensors must be on the CPU, but x is on ",
                    x.device());
  TORCH_CHECK_TYPE(
      !own_gemm || x.scalar_type() == at::kDouble || (x.scalar_type() == at::kFloat && A.scalar_type() != at::kDouble),
      "gralora_ext: with own_gemm x must be float32, or float64 where A is, but x is ", x.scalar_type(), " and A is ",
      A.scalar_type());
  check_tensor(weight, "weight", A.device());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == s.M && weight.size(1) == s.N,
                    "gralora_ext: weight must be [M, N] = [", s.M, ", ", s.N, "] to go with A and B, but has shape ",
                    weight.sizes());
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), "gralora_ext: weight must have x's dtype ", x.scalar_type(),
                   ", but is ", weight.scalar_type());
  if (bias.has_value()) {
    check_tensor(*bias, "bias", A.device());
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == s.M, "gralora_ext: bias must be [M] = [", s.M,
                      "] to go with B, but has shape ", bias->sizes());
    TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), "gralora_ext: bias must have x's dtype ", x.scalar_type(),
                     ", but is ", bias->scalar_type());
  }
  check_dropout(dropout_p, seed, A.device());
  s.T = leading_size(x);
  return s;
}

inline Shape check_merge(const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B,
                         const OptionalTensor& A_general, const OptionalTensor& B_general, double scaling,
                         bool fan_in_fan_out) {
  const Shape s = check_adapter(A, B, A_general, B_general, scaling);
  check_tensor(weight, "weight", A.device());
  const int64_t rows = fan_in_fan_out ? s.N : s.M, columns = fan_in_fan_out ? s.M : s.N;
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns,
                    "gralora_ext: weight must be ", fan_in_fan_out ? "[N, M]" : "[M, N]", " = [", rows, ", ", columns,
                    "] to go with A and B, but has shape ", weight.sizes());
  check_written(weight, "weight", A, B, A_general, B_general);
  return s;
}

}  // namespace gralora
