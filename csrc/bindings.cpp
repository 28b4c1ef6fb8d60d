// SPDX-License-Identifier: Apache-2.0
// The Python module gralora_ext._C: what was built and what is in use, and shorter ways to the ops
// for eager mode (eager_bindings.cpp). The operations themselves are reached through
// torch.ops.gralora_ext (registration.cpp, in this same library), so that torch.compile and
// autograd see them.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/machine.h"
#include "cpu/plan.h"
#include "eager_bindings.h"
#include "explain_bindings.h"
#ifdef GRALORA_HAVE_CUDA
#include "cuda/launch.h"
#endif

namespace {

#define GRALORA_TEXT(...) #__VA_ARGS__
#define GRALORA_TEXT_OF(...) GRALORA_TEXT(__VA_ARGS__)
#ifndef GRALORA_CUDA_ARCHS
#define GRALORA_CUDA_ARCHS
#endif

// _loader.py reads this mark in the file, before it loads a library that was built for another
// torch.
constexpr char kBuiltForTorch[] = "gralora_ext built for torch " GRALORA_TEXT_OF(GRALORA_TORCH_VERSION);

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// "8.0,9.0+PTX" as a list
std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
  std::istringstream all(GRALORA_TEXT_OF(GRALORA_CUDA_ARCHS));
  for (std::string arch; std::getline(all, arch, ',');) archs.push_back(arch);
  return archs;
}

pybind11::dict build() {
  pybind11::dict info;
  info["mark"] = kBuiltForTorch;
  info["torch"] = GRALORA_TEXT_OF(GRALORA_TORCH_VERSION);
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["python"] = PY_VERSION;
  info["cuda_archs"] = cuda_archs();
  return info;
}

#ifdef GRALORA_HAVE_CUDA
void run_cuda_instruction(const std::string& name, const std::vector<uintptr_t>& arrays) {
  std::vector<void*> pointers;
  for (const uintptr_t array : arrays) pointers.push_back(reinterpret_cast<void*>(array));
  const int error = gralora::cuda::run_instruction(name.c_str(), pointers.data());
  if (error != 0) throw std::runtime_error(name + ": " + gralora::cuda::error_text(error));
}
#endif

std::vector<std::string> compiled_capabilities() {
  std::vector<std::string> names;
  for (const gralora::cpu::Capability capability : gralora::cpu::compiled_capabilities()) {
    names.emplace_back(gralora::cpu::name(capability));
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the native half of gralora_ext was built with, and what it uses on this machine.";
  m.def(
      "cpu_capability", [] { return std::string(gralora::cpu::name(gralora::cpu::machine().capability)); },
      "The instruction set that the kernels use: 'default', 'avx2' or 'avx512'.");
  m.def(
      "cpu_amx", [] { return gralora::cpu::machine().amx; },
      "Whether products of bfloat16 activations are by AMX's tiles.");
  m.def("tokens_for_one_operation", &gralora::cpu::tokens_for_one_operation,
        "From how many tokens on a frozen layer and its adapter are one operation.");
  m.def(
      "one_product_is_quicker", [] { return gralora::cpu::one_product_is_quicker(gralora::cpu::machine()); },
      "Whether that operation, in float32, is quicker as one product with W + dW.");
  m.def("explain", &gralora::explain, pybind11::arg("case"), pybind11::arg("machine") = pybind11::dict(),
        "The plans of a layer's passes on this machine, or one that differs from it as `machine` says.");
  m.def("compiled_capabilities", &compiled_capabilities,
        "The instruction sets that this build holds, in rising order.");
  m.def("num_threads", [] { return at::get_num_threads(); }, "torch's number of threads, which the kernels use too.");
  if (PyModule_AddFunctions(m.ptr(), gralora::eager_methods) != 0) throw pybind11::error_already_set();
#ifdef GRALORA_HAVE_CUDA
  m.def("run_cuda_instruction", &run_cuda_instruction,
        "Runs the conformance kernel of that name on the current device's default stream; arrays: device addresses.");
#endif
  m.def("build", &build, "The torch, Python, compiler and C++ standard of the build, and its CUDA architectures.");
}
