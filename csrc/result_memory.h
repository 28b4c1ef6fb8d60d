// SPDX-License-Identifier: Apache-2.0
// Memory of large results on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace gralora {

// An uninitialised tensor with the sizes, strides and dtype of `like`, as at::empty_like gives it.
// Large ones take their memory from a small pool: glibc returns freed blocks of this size to the
// system, and touching fresh memory costs a page fault per 4 KiB, which takes several times as
// long as the kernel that writes there.
at::Tensor empty_result_like(const at::Tensor& like);
// The same, contiguous and of other sizes and another dtype, on the device of `like`
at::Tensor empty_result(at::IntArrayRef sizes, const at::Tensor& like, at::ScalarType type);

}  // namespace gralora
