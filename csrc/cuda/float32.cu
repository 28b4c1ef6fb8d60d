// SPDX-License-Identifier: Apache-2.0
#include "tensor_cores.cuh"

namespace gralora::cuda {

GRALORA_INSTANTIATE(float, float)

}  // namespace gralora::cuda
