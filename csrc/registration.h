// SPDX-License-Identifier: Apache-2.0
// The table of kernels that every device has. A test registers it for a device of its own.
#pragma once

#include <torch/library.h>

#include "ops.h"

namespace gralora {

inline void register_kernels(torch::Library& m) {
  m.impl("gralora", &forward_kernel);
  m.impl("gralora_", &forward_into_kernel);
  m.impl("gralora_backward", &backward_kernel);
  m.impl("merge_", &merge_kernel);
  m.impl("delta_weight", &delta_weight_kernel);
  m.impl("linear", &linear_kernel);
  m.impl("linear_backward", &linear_backward_kernel);
}

}  // namespace gralora
