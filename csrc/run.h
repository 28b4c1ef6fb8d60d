// SPDX-License-Identifier: Apache-2.0
// A pass on the device of its tensors: the one place that knows which devices there are.
#pragma once

#include <ATen/core/Tensor.h>

#include "gralora.h"

namespace gralora {

// `like` is one of the pass's tensors. Where it is not on the CPU it is on a CUDA device: the pass
// goes to the current stream of that device, and what it works in comes from torch's allocator.
void run(ForwardParams p, const at::Tensor& like);
void run(BackwardParams p, const at::Tensor& like);
void run(MergeParams p, const at::Tensor& like);
// The CPU only
void run(LinearParams p);
void run_merge_coded(CodedParams p);
void run_unmerge_coded(CodedParams p);
void run_checksums(CodedParams p);

}  // namespace gralora
