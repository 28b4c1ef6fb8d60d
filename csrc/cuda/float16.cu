// SPDX-License-Identifier: Apache-2.0
#include "tensor_cores.cuh"

namespace gralora::cuda {

GRALORA_INSTANTIATE(__half, float)
GRALORA_INSTANTIATE(__half, __half)

}  // namespace gralora::cuda
