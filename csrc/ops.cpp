// SPDX-License-Identifier: Apache-2.0
// Per op: check -> allocate -> fill Params -> launch.
#include "ops.h"

#include <ATen/ops/empty.h>

#include "checks.h"
#include "gralora.h"
#include "params.h"
#include "result_memory.h"
#include "run.h"

namespace gralora {
namespace {

// The accumulation type. Where all is bfloat16, the CPU's kernels round U as a factor anyway, in
// PEFT's layer it is bfloat16 too, and with many ranks writing it costs: 2048^2, r = 256, k = 8
// has as much of it as of x.
at::ScalarType dtype_of_u(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A, bool f64) {
  return f64 ? at::kDouble : keeps_bf16_u({&x, &base, &A}) ? at::kBFloat16 : at::kFloat;
}

// Whether the mask is kept: to draw it is most of what dropout costs, and its bits are 1/32 of a
// float32 x.
bool keeps_mask(const at::Tensor& x, const Shape& s, double dropout_p) {
  return x.is_cpu() && dropout_p > 0.0 && mask_fills_bytes(s);
}

// Writes y, which may be base, and returns it with what backward needs.
ForwardResult run_forward(const Shape& shape, const at::Tensor& x, const at::Tensor& base, const at::Tensor& y,
                          const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                          const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
                          double dropout_p) {
  const at::Tensor x_rows = as_rows(x), base_rows = as_rows(base), y_rows = y.is_same(base) ? base_rows : as_rows(y);
  ForwardParams p;
  p.accumulate_f64 = any_double({&x, &base, &A});
  const at::ScalarType type = dtype_of_u(x, base, A, p.accumulate_f64);
  const int64_t ranks = shape.k * shape.r + shape.h;
  const bool keep_u = keeps_u(x, A, shape);
  const at::Tensor u =
      empty_result({keep_u || x.is_cpu() ? shape.T : 0, ranks}, x, type);  // the CPU's kernels work in it
  p.shape = shape;
  p.adapter = adapter_of(A, B, A_general, B_general);
  p.x = rows_of(x_rows), p.base = rows_of(base_rows), p.y = rows_of(y_rows);
  p.u = u.size(0) == shape.T ? u.mutable_data_ptr() : nullptr;
  p.u_bf16 = u.scalar_type() == at::kBFloat16;
  p.scaling = scaling;
  const at::Tensor kept = empty_result({keeps_mask(x, shape, dropout_p) ? shape.T : 0, shape.N / 8}, x, at::kByte);
  p.dropout = dropout_of(dropout_p, seed, kept, false);
  run(p, x);
  if (!y_rows.is_same(y)) y.copy_(y_rows);
  return {y, keep_u ? u : empty_result({0, ranks}, x, type), kept};
}

void merge_into(const at::Tensor& weight, const Shape& shape, const at::Tensor& A, const at::Tensor& B,
                const OptionalTensor& A_general, const OptionalTensor& B_general, double scaling, bool fan_in_fan_out,
                bool accumulate) {
  if (weight.numel() == 0) return;
  MergeParams p;
  p.shape = shape;
  p.adapter = adapter_of(A, B, A_general, B_general);
  p.weight = param_of(fan_in_fan_out ? weight.t() : weight);
  p.accumulate = accumulate;
  p.scaling = scaling;
  p.accumulate_f64 = any_double({&weight, &A});
  run(p, weight);
}

}  // namespace

ForwardResult forward_kernel(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A, const at::Tensor& B,
                             const OptionalTensor& A_general, const OptionalTensor& B_general,
                             const OptionalTensor& seed, double scaling, double dropout_p) {
  const Shape shape = check_forward(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
  const at::Tensor y = empty_result_like(base);
  return run_forward(shape, x, base, y, A, B, A_general, B_general, seed, scaling, dropout_p);
}

ForwardResult forward_into_kernel(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A, const at::Tensor& B,
                                  const OptionalTensor& A_general, const OptionalTensor& B_general,
                                  const OptionalTensor& seed, double scaling, double dropout_p) {
  const Shape shape = check_forward_into(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
  return run_forward(shape, x, base, base, A, B, A_general, B_general, seed, scaling, dropout_p);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_kernel(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& u, const at::Tensor& kept, const at::Tensor& A,
    const at::Tensor& B, const OptionalTensor& A_general, const OptionalTensor& B_general, const OptionalTensor& seed,
    double scaling, double dropout_p, std::array<bool, 5> needs) {
  const Shape shape = check_backward(grad, x, u, kept, A, B, A_general, B_general, seed, scaling, dropout_p);
  const at::Tensor dx = needs[0] ? empty_result_like(x) : at::Tensor();
  return backward_to(dx, false, shape, grad, x, u, kept, A, B, A_general, B_general, seed, scaling, dropout_p, needs);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_to(
    const at::Tensor& dx, bool add, const Shape& shape, const at::Tensor& grad, const at::Tensor& x,
    const at::Tensor& u, const at::Tensor& kept, const at::Tensor& A, const at::Tensor& B,
    const OptionalTensor& A_general, const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
    double dropout_p, std::array<bool, 5> needs) {
  const at::Tensor grad_rows = as_rows(grad), x_rows = as_rows(x), dx_rows = dx.defined() ? as_rows(dx) : dx;
  const auto gradient = [](bool wanted, const at::Tensor& of) {
    return wanted ? empty_result_like(of) : empty_result({0}, of, of.scalar_type());
  };
  const at::Tensor dA = gradient(needs[1], A), dB = gradient(needs[2], B);
  const at::Tensor dA_general = gradient(needs[3] && A_general.has_value(), A_general.value_or(A));
  const at::Tensor dB_general = gradient(needs[4] && B_general.has_value(), B_general.value_or(B));

  BackwardParams p;
  p.shape = shape;
  p.adapter = adapter_of(A, B, A_general, B_general);
  p.grad_y = rows_of(grad_rows), p.x = rows_of(x_rows);
  p.u = u.size(0) == shape.T ? u.const_data_ptr() : nullptr;
  p.u_bf16 = u.scalar_type() == at::kBFloat16;
  if (dx.defined()) p.grad_x = rows_of(dx_rows), p.add_to_grad_x = add;
  if (needs[1]) p.grad.A = param_of(dA);
  if (needs[2]) p.grad.B = param_of(dB);
  if (needs[3] && A_general.has_value()) p.grad.A_general = param_of(dA_general);
  if (needs[4] && B_general.has_value()) p.grad.B_general = param_of(dB_general);
  p.scaling = scaling;
  p.dropout = dropout_of(dropout_p, seed, kept, true);
  p.accumulate_f64 = u.scalar_type() == at::kDouble;
  run(p, x);
  if (dx.defined() && !dx_rows.is_same(dx)) dx.copy_(dx_rows);
  return {dx.defined() ? dx : gradient(false, x), dA, dB, dA_general, dB_general};
}

void merge_kernel(at::Tensor weight, const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                  const OptionalTensor& B_general, double scaling, bool fan_in_fan_out) {
  const Shape shape = check_merge(weight, A, B, A_general, B_general, scaling, fan_in_fan_out);
  merge_into(weight, shape, A, B, A_general, B_general, scaling, fan_in_fan_out, true);
  bump_version(weight);
}

at::Tensor delta_weight_kernel(const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                               const OptionalTensor& B_general, double scaling, bool fan_in_fan_out) {
  const Shape shape = check_adapter(A, B, A_general, B_general, scaling);
  const at::Tensor weight =
      fan_in_fan_out ? at::empty({shape.N, shape.M}, A.options()) : at::empty({shape.M, shape.N}, A.options());
  merge_into(weight, shape, A, B, A_general, B_general, scaling, fan_in_fan_out, false);
  return weight;
}

}  // namespace gralora
