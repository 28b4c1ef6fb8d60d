// SPDX-License-Identifier: Apache-2.0
// The ops as the dispatcher calls them: by the kernels that it has for their tensors, autograd's
// first.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <type_traits>

#include "ops.h"

namespace gralora {

// A function pointer tells the types that the schema `name` has in C++.
template <auto kernel>
const auto& dispatched(const char* name) {
  using Kernel = std::remove_pointer_t<decltype(kernel)>;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Kernel>();
  return op;
}

inline const auto& forward_op() { return dispatched<&forward_kernel>("gralora_ext::gralora"); }
inline const auto& forward_into_op() { return dispatched<&forward_into_kernel>("gralora_ext::gralora_"); }
inline const auto& backward_op() { return dispatched<&backward_kernel>("gralora_ext::gralora_backward"); }
inline const auto& linear_op() { return dispatched<&linear_kernel>("gralora_ext::linear"); }
inline const auto& linear_backward_op() { return dispatched<&linear_backward_kernel>("gralora_ext::linear_backward"); }
inline const auto& merge_op() { return dispatched<&merge_kernel>("gralora_ext::merge_"); }

}  // namespace gralora
