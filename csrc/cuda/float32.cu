// SPDX-License-Identifier: Apache-2.0
#include "launchers.cuh"

namespace gralora::cuda {

GRALORA_INSTANTIATE(float, float)
GRALORA_INSTANTIATE(float, bf16)
GRALORA_INSTANTIATE(float, __half)
GRALORA_INSTANTIATE_GRADIENTS(float)

}  // namespace gralora::cuda
