// SPDX-License-Identifier: Apache-2.0
// For people and tests: the plans of the CPU passes (cpu/plan.h), and which CUDA kernels a layer
// would get.
#pragma once

#include <pybind11/pybind11.h>

namespace gralora {

// `case_` has T, N, M, k, r, h, threads, the names of two dtypes as activations and parameters,
// and dropout (bool). `machine` has what is to differ from this machine: capability and vendor
// (their names), bf16_instructions, amx. All tensors are contiguous, as PEFT makes them. Returns a
// dict of dicts: machine, forward, backward, backward_without_U, merge, merge_fan_in_fan_out,
// linear, cuda.
pybind11::dict explain(const pybind11::dict& case_, const pybind11::dict& machine);

}  // namespace gralora
