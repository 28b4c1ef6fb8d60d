// SPDX-License-Identifier: Apache-2.0
#include "launchers.cuh"

namespace gralora::cuda {

GRALORA_INSTANTIATE(__half, float)
GRALORA_INSTANTIATE(__half, __half)
GRALORA_INSTANTIATE_GRADIENTS(__half)

}  // namespace gralora::cuda
