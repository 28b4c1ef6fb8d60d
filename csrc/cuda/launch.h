// SPDX-License-Identifier: Apache-2.0
// The CUDA passes as ops.cpp calls them, on the current device: no header of CUDA or torch. They
// return 0 or a cudaError_t, and do not wait for the device.
#pragma once

#include "gralora.h"

namespace gralora::cuda {

// The bytes on the device, at a multiple of 16, that a pass works in beside its arguments
int64_t workspace_bytes(const ForwardParams& p);
int64_t workspace_bytes(const BackwardParams& p);

// Of forward, p.u may be null: it is not written then.
int pass(const ForwardParams& p, void* workspace, void* stream);
int pass(const BackwardParams& p, void* workspace, void* stream);
int merge(const MergeParams& p, void* stream);

// The conformance kernel of that name (conformance.cu) on one warp, with its arrays on the device
int run_instruction(const char* name, void* const* arrays);

const char* error_text(int error);

}  // namespace gralora::cuda
