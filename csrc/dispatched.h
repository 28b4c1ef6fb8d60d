// The ops as the dispatcher calls them: by the kernels that it has for their tensors, autograd's first.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops.h"

namespace gralora {

template <class Kernel>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Kernel>();
}

inline auto forward_op() {
  static const auto op = find_op<decltype(forward_kernel)>("gralora_ext::gralora");
  return op;
}

inline auto forward_into_op() {
  static const auto op = find_op<decltype(forward_into_kernel)>("gralora_ext::gralora_");
  return op;
}

inline auto backward_op() {
  static const auto op = find_op<decltype(backward_kernel)>("gralora_ext::gralora_backward");
  return op;
}

inline auto linear_op() {
  static const auto op = find_op<decltype(linear_kernel)>("gralora_ext::linear");
  return op;
}

inline auto linear_backward_op() {
  static const auto op = find_op<decltype(linear_backward_kernel)>("gralora_ext::linear_backward");
  return op;
}

inline auto merge_op() {
  static const auto op = find_op<decltype(merge_kernel)>("gralora_ext::merge_");
  return op;
}

}  // namespace gralora
