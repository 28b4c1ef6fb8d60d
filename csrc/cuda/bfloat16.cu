// SPDX-License-Identifier: Apache-2.0
#include "tensor_cores.cuh"

namespace gralora::cuda {

GRALORA_INSTANTIATE(bf16, float)
GRALORA_INSTANTIATE(bf16, bf16)

}  // namespace gralora::cuda
