// SPDX-License-Identifier: Apache-2.0
#include "launchers.cuh"

namespace gralora::cuda {

GRALORA_INSTANTIATE(bf16, float)
GRALORA_INSTANTIATE(bf16, bf16)
GRALORA_INSTANTIATE_GRADIENTS(bf16)

}  // namespace gralora::cuda
