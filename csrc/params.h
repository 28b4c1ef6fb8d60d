// SPDX-License-Identifier: Apache-2.0
// From tensors to the structs of gralora.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

#include "gralora.h"

namespace gralora {

using OptionalTensor = std::optional<at::Tensor>;

// What autograd has saved of `written` for a backward is told apart from what is in it now.
inline void bump_version(const at::Tensor& written) {
  if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
}

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    case at::kDouble: return DType::f64;
    default: return DType::f32;
  }
}

inline bool any_double(std::initializer_list<const at::Tensor*> tensors) {
  for (const at::Tensor* tensor : tensors)
    if (tensor->scalar_type() == at::kDouble) return true;
  return false;
}

// Whether all is bfloat16, on the CPU: there U is kept in it too
inline bool keeps_bf16_u(std::initializer_list<const at::Tensor*> tensors) {
  for (const at::Tensor* tensor : tensors)
    if (tensor->scalar_type() != at::kBFloat16 || !tensor->is_cpu()) return false;
  return true;
}

// Whether forward keeps U for backward. A 16-bit x beside wider parameters is chosen to save
// memory (PEFT's layer keeps a copy of x in their dtype): U must stay small there, and where the
// ranks are many, backward makes it again from x. one_product: of a linear layer whose weight is
// merged while it is read, which has no U.
inline bool keeps_u(const at::Tensor& x, const at::Tensor& A, const Shape& s, bool one_product = false) {
  constexpr int64_t kShare = 16;
  const int64_t ranks = s.k * s.r + s.h;
  return !one_product && (x.element_size() > 2 || A.element_size() <= 2 || kShare * ranks <= s.N + ranks);
}

// Whether the mask of each block of a row is whole bytes, in which alone it can be kept for
// backward
inline bool mask_fills_bytes(const Shape& s) { return s.N / s.k % 8 == 0; }

// Leading dimensions of one element vanish and those that lie as one are joined; false: too many
// are left.
inline bool fill_rows(const at::Tensor& tensor, Activation& rows) {
  rows = Activation{};
  rows.data = const_cast<void*>(tensor.const_data_ptr());
  rows.dtype = dtype_of(tensor);
  rows.column_stride = tensor.stride(-1);
  for (int64_t d = 0; d + 1 < tensor.dim(); d++) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    const int last = rows.leading_dims - 1;
    if (last >= 0 && rows.strides[last] == size * stride) {
      rows.sizes[last] *= size, rows.strides[last] = stride;
      continue;
    }
    if (rows.leading_dims == kMaxLeadingDims) return false;
    rows.sizes[rows.leading_dims] = size, rows.strides[rows.leading_dims++] = stride;
  }
  return true;
}

// A tensor as the kernels take it: itself, or a contiguous copy. Those for the CPU walk any
// strides of at most kMaxLeadingDims dimensions, those for CUDA want columns side by side, in rows
// that are evenly spaced.
inline at::Tensor as_rows(const at::Tensor& tensor) {
  Activation rows;
  const bool fits = fill_rows(tensor, rows);
  const bool simple = rows.leading_dims <= 1 && rows.column_stride == 1;
  return fits && (simple || tensor.is_cpu()) ? tensor : tensor.contiguous();
}

inline Activation rows_of(const at::Tensor& tensor) {
  Activation rows;
  TORCH_INTERNAL_ASSERT(fill_rows(tensor, rows));
  return rows;
}

inline Param param_of(const at::Tensor& tensor) {
  Param p;
  p.data = const_cast<void*>(tensor.const_data_ptr());
  p.dtype = dtype_of(tensor);
  p.column_stride = tensor.stride(-1), p.row_stride = tensor.stride(-2);
  p.block_stride = tensor.dim() == 3 ? tensor.stride(0) : 0;
  return p;
}

inline Adapter adapter_of(const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                          const OptionalTensor& B_general) {
  Adapter adapter{param_of(A), param_of(B), {}, {}};
  if (A_general.has_value()) adapter.A_general = param_of(*A_general), adapter.B_general = param_of(*B_general);
  return adapter;
}

// `drawn`: kept, where it has rows, holds the mask
inline Dropout dropout_of(double p, const OptionalTensor& seed, const at::Tensor& kept, bool drawn) {
  if (p <= 0.0) return {};
  auto* bits = kept.size(0) > 0 ? static_cast<uint8_t*>(const_cast<void*>(kept.const_data_ptr())) : nullptr;
  return {p, seed->const_data_ptr<int64_t>(), bits, drawn};
}

}  // namespace gralora
