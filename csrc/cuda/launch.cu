// SPDX-License-Identifier: Apache-2.0
// Which kernels a call gets: those on tensor cores for the pairs of dtypes and strides that they
// take, from compute capability 8.0 on, and the plain ones (simt.cuh) for all else.
#include "launch.h"

#include "simt_passes.cuh"
#include "tensor_cores.cuh"

namespace gralora::cuda {
namespace {

bool plain_rows(const Activation& x) { return x.data == nullptr || (x.column_stride == 1 && x.leading_dims <= 1); }

// Columns of a block are counted in 32 bits there.
bool narrow(const Shape& s) {
  constexpr int64_t kWidest = int64_t(1) << 30;
  return s.N / s.k < kWidest && s.M / s.k < kWidest;
}

bool on_tensor_cores(const ForwardParams& p, const Device& device) {
  return device.capability >= 80 && narrow(p.shape) && has_tensor_core_kernels(p.x.dtype, p.adapter.A.dtype) &&
         has_tensor_core_kernels(p.y.dtype, p.adapter.A.dtype) && plain_rows(p.x) && plain_rows(p.base) &&
         plain_rows(p.y);
}
bool on_tensor_cores(const BackwardParams& p, const Device& device) {
  return device.capability >= 80 && narrow(p.shape) && has_tensor_core_kernels(p.x.dtype, p.adapter.A.dtype) &&
         has_tensor_core_kernels(p.grad_y.dtype, p.adapter.A.dtype) && !p.accumulate_f64 && plain_rows(p.x) &&
         plain_rows(p.grad_y) && plain_rows(p.grad_x);
}

int element_size(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::f64 ? 8 : 2; }

ForwardPlan plan_of(const ForwardParams& p, const Device& device) {
  return ForwardPlan::of(p, column_splits(p.shape, p.shape.N, element_size(p.x.dtype), device));
}
BackwardPlan plan_of(const BackwardParams& p, const Device& device) {
  return BackwardPlan::of(p, column_splits(p.shape, p.shape.M, element_size(p.grad_y.dtype), device),
                          token_splits(p.shape, device));
}

// W^T = sum of B_j^T's columns times A_n^T's: the same merge, with the two parameters in each
// other's place.
MergeParams of_transposed_weight(MergeParams p) {
  std::swap(p.shape.N, p.shape.M);
  std::swap(p.adapter.A, p.adapter.B), std::swap(p.adapter.A_general, p.adapter.B_general);
  for (Param* param : {&p.adapter.A, &p.adapter.B, &p.adapter.A_general, &p.adapter.B_general, &p.weight})
    *param = gralora::transposed(*param);
  return p;
}

template <class Params>
int64_t workspace_of(const Params& p) {
  const Device device = current_device();
  if (!on_tensor_cores(p, device)) return simt::workspace(p);
  return plan_of(p, device).floats() * int64_t(sizeof(float));
}

template <class Params>
int chosen_pass(const Params& p, void* workspace, void* stream) {
  const Device device = current_device();
  const auto on = static_cast<cudaStream_t>(stream);
  if (!on_tensor_cores(p, device)) return simt::pass(p, workspace, on);
  return tensor_cores::pass(p, plan_of(p, device), static_cast<float*>(workspace), on);
}

}  // namespace

int64_t workspace_bytes(const ForwardParams& p) { return workspace_of(p); }
int64_t workspace_bytes(const BackwardParams& p) { return workspace_of(p); }

int pass(const ForwardParams& p, void* workspace, void* stream) { return chosen_pass(p, workspace, stream); }
int pass(const BackwardParams& p, void* workspace, void* stream) { return chosen_pass(p, workspace, stream); }

int merge(const MergeParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const bool by_rows = p.weight.column_stride == 1, by_columns = p.weight.row_stride == 1;
  if (current_device().capability < 80 || !narrow(p.shape) ||
      !has_tensor_core_kernels(p.weight.dtype, p.adapter.A.dtype) || !(by_rows || by_columns))
    return simt::merge(p, on);
  return tensor_cores::merge(by_rows ? p : of_transposed_weight(p), on);
}

const char* error_text(int error) { return error_text(static_cast<cudaError_t>(error)); }

}  // namespace gralora::cuda
