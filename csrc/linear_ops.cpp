// The layer in one product, y = x (W + dW)^T + bias, and its backward. Per op: check -> allocate -> fill Params -> launch.
#include <ATen/ops/empty.h>

#include <vector>

#include "checks.h"
#include "ops.h"
#include "params.h"
#include "result_memory.h"
#include "run.h"

namespace gralora {
namespace {

// out = in P, with P's columns as the last dimension of out
at::Tensor multiply(const Shape& shape, const at::Tensor& in, const at::Tensor& weight, const OptionalTensor& bias,
                    const Adapter& adapter, double scaling, bool transposed) {
  std::vector<int64_t> sizes(in.sizes().begin(), in.sizes().end());
  sizes.back() = transposed ? shape.N : shape.M;
  const at::Tensor out = empty_result(sizes, in), in_rows = as_rows(in);
  const at::Tensor added = bias.has_value() ? bias->contiguous() : at::Tensor();
  LinearParams p;
  p.shape = shape;
  p.adapter = adapter;
  p.in = rows_of(in_rows), p.out = rows_of(out);
  p.weight = param_of(weight);
  p.bias = added.defined() ? added.const_data_ptr() : nullptr;
  p.transposed = transposed;
  p.scaling = scaling;
  p.accumulate_f64 = in.scalar_type() == at::kDouble;
  run(p);
  return out;
}

}  // namespace

at::Tensor linear_kernel(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& A,
                         const at::Tensor& B, const OptionalTensor& A_general, const OptionalTensor& B_general,
                         double scaling) {
  const Shape shape = check_linear(x, weight, bias, A, B, A_general, B_general, scaling);
  return multiply(shape, x, weight, bias, adapter_of(A, B, A_general, B_general), scaling, false);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_backward_kernel(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& A, const at::Tensor& B,
    const OptionalTensor& A_general, const OptionalTensor& B_general, double scaling, std::array<bool, 5> needs) {
  const Shape shape = check_linear(x, weight, {}, A, B, A_general, B_general, scaling);
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), "gralora_ext: grad must have x's dtype ", x.scalar_type(),
                   ", but is ", grad.scalar_type());
  const at::Tensor u = at::empty({0, shape.k * shape.r + shape.h}, x.options());
  const bool want_x = needs[0];
  needs[0] = false;
  auto gradients = backward_kernel(grad, x, u, A, B, A_general, B_general, {}, scaling, 0.0, needs);
  if (want_x)
    std::get<0>(gradients) = multiply(shape, grad, weight, {}, adapter_of(A, B, A_general, B_general), scaling, true);
  return gradients;
}

}  // namespace gralora
