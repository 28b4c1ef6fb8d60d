// SPDX-License-Identifier: Apache-2.0
// The schemas and the tables of kernels; nothing else.
#include "registration.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

TORCH_LIBRARY(gralora_ext, m) {
  m.def(
      "gralora(Tensor x, Tensor base, Tensor A, Tensor B, Tensor? A_general, Tensor? B_general, Tensor? seed, "
      "float scaling, float dropout_p) -> (Tensor y, Tensor u, Tensor kept)");
  // y in base's memory: the same sums, no allocation. Eager mode only; torch.compile makes its own
  // choice of buffers.
  m.def(
      "gralora_(Tensor x, Tensor(a!) base, Tensor A, Tensor B, Tensor? A_general, Tensor? B_general, Tensor? seed, "
      "float scaling, float dropout_p) -> (Tensor(a!) y, Tensor u, Tensor kept)");
  m.def(
      "gralora_backward(Tensor grad, Tensor x, Tensor u, Tensor kept, Tensor A, Tensor B, Tensor? A_general, "
      "Tensor? B_general, Tensor? seed, float scaling, float dropout_p, bool[5] needs) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "merge_(Tensor(a!) weight, Tensor A, Tensor B, Tensor? A_general, Tensor? B_general, float scaling, "
      "bool fan_in_fan_out) -> ()");
  m.def(
      "delta_weight(Tensor A, Tensor B, Tensor? A_general, Tensor? B_general, float scaling, bool fan_in_fan_out) "
      "-> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor? A_general, Tensor? B_general, "
      "Tensor? seed, float scaling, float dropout_p, bool own_gemm) -> (Tensor y, Tensor u, Tensor kept)");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor u, Tensor kept, Tensor weight, Tensor A, Tensor B, "
      "Tensor? A_general, Tensor? B_general, Tensor? seed, float scaling, float dropout_p, bool own_gemm, "
      "bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "merge_coded(Tensor weight, Tensor(a!) to, Tensor?[] adapters, float[] scalings, bool fan_in_fan_out, "
      "Tensor(b!) codes, Tensor(c!) places, Tensor(d!) values, Tensor(e!) facts) -> ()");
  m.def(
      "unmerge_coded_(Tensor(a!) weight, Tensor?[] adapters, float[] scalings, bool fan_in_fan_out, Tensor codes, "
      "Tensor places, Tensor values) -> int before");
  m.def("checksums(Tensor weight, bool fan_in_fan_out) -> (int before, int after)");
  m.def("empty_codes(Tensor weight) -> Tensor");
}

TORCH_LIBRARY_IMPL(gralora_ext, CPU, m) {
  gralora::register_kernels(m);
  m.impl("merge_coded", &gralora::merge_coded_kernel);
  m.impl("unmerge_coded_", &gralora::unmerge_coded_kernel);
  m.impl("checksums", &gralora::checksums_kernel);
  m.impl("empty_codes", &gralora::empty_codes_kernel);
}
#ifdef GRALORA_HAVE_CUDA
TORCH_LIBRARY_IMPL(gralora_ext, CUDA, m) { gralora::register_kernels(m); }
#endif

TORCH_LIBRARY_IMPL(gralora_ext, Autograd, m) {
  m.impl("gralora", &gralora::forward_autograd);
  m.impl("gralora_", &gralora::forward_into_autograd);
  m.impl("gralora_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("merge_", torch::autograd::autogradNotImplementedFallback());
  m.impl("delta_weight", torch::autograd::autogradNotImplementedFallback());
  m.impl("linear", &gralora::linear_autograd);
  m.impl("linear_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("merge_coded", torch::autograd::autogradNotImplementedFallback());
  m.impl("unmerge_coded_", torch::autograd::autogradNotImplementedFallback());
}
