// SPDX-License-Identifier: Apache-2.0
// The plans of the CPU passes (cpu/plan.h), for people and tests.
#pragma once

#include <pybind11/pybind11.h>

namespace gralora {

// `case_` has T, N, M, k, r, h, threads, the names of two dtypes as activations and parameters,
// and dropout (bool). `machine` has what is to differ from this machine: capability and vendor
// (their names), bf16_instructions, amx. Both are a layer's and its adapter's as PEFT makes them:
// contiguous. Returns a dict of dicts:
// machine, forward, backward, backward_without_U, merge, merge_fan_in_fan_out, linear.
pybind11::dict explain(const pybind11::dict& case_, const pybind11::dict& machine);

}  // namespace gralora
