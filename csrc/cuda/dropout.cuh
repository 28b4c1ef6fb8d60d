// SPDX-License-Identifier: Apache-2.0
// A call's dropout as the kernels take it.
#pragma once

#include <cmath>

#include "gralora.h"
#include "mask.cuh"

namespace gralora::cuda {

inline Mask mask_of(const Dropout& d, int64_t width) {
  if (d.p <= 0.0) return {};
  return {d.seed, uint32_t(std::nearbyint(d.p * 65536.0)), width};  // half to even, as the reference rounds
}
inline double keep_scale(const Dropout& d) { return d.p > 0.0 ? 1.0 / (1.0 - d.p) : 1.0; }

}  // namespace gralora::cuda
