// SPDX-License-Identifier: Apache-2.0
// A frozen layer with its adapter, and its backward. By our GEMM one product, y = x
// (W + dW)^T + bias. By torch's, and with dropout, which falls on x before A alone, y = x
// W^T + bias, and then the path of x into it; so dx = g W, and then the path's dx into it. Per op:
// check -> allocate -> fill Params -> launch.
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <vector>

#include "checks.h"
#include "ops.h"
#include "params.h"
#include "result_memory.h"
#include "run.h"

namespace gralora {
namespace {

std::vector<int64_t> sizes_with(const at::Tensor& in, int64_t columns) {
  std::vector<int64_t> sizes(in.sizes().begin(), in.sizes().end());
  sizes.back() = columns;
  return sizes;
}

// out = in P + bias, where P is (W + dW)^T, or W + dW if transposed
at::Tensor multiply(const Shape& shape, const at::Tensor& in, const at::Tensor& weight, const OptionalTensor& bias,
                    const Adapter& adapter, double scaling, bool transposed) {
  const at::Tensor out = empty_result(sizes_with(in, transposed ? shape.N : shape.M), in, in.scalar_type());
  const at::Tensor in_rows = as_rows(in);
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

// The base layer alone, by our GEMM or by torch's
at::Tensor multiply_base(Shape shape, const at::Tensor& in, const at::Tensor& weight, const OptionalTensor& bias,
                         bool transposed, bool own_gemm) {
  if (own_gemm) {
    shape.k = 1, shape.r = 0, shape.h = 0;
    return multiply(shape, in, weight, bias, {}, 1.0, transposed);
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // y has x's dtype
  if (transposed) return at::mm(in.reshape({shape.T, shape.M}), weight).view(sizes_with(in, shape.N));
  return at::linear(in, weight, bias);
}

}  // namespace

ForwardResult linear_kernel(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                            const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                            const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
                            double dropout_p, bool own_gemm) {
  const Shape shape = check_linear(x, weight, bias, A, B, A_general, B_general, seed, scaling, dropout_p, own_gemm);
  if (!own_gemm || dropout_p > 0.0) {
    const at::Tensor y = multiply_base(shape, x, weight, bias, false, own_gemm);
    return forward_into_kernel(x, y, A, B, A_general, B_general, seed, scaling, dropout_p);
  }
  const at::Tensor y = multiply(shape, x, weight, bias, adapter_of(A, B, A_general, B_general), scaling, false);
  return {y, empty_result({0, shape.k * shape.r + shape.h}, x, x.scalar_type()),
          empty_result({0, shape.N / 8}, x, at::kByte)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_backward_kernel(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& u, const at::Tensor& kept, const at::Tensor& weight,
    const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general, const OptionalTensor& B_general,
    const OptionalTensor& seed, double scaling, double dropout_p, bool own_gemm, std::array<bool, 5> needs) {
  const Shape shape = check_linear(x, weight, {}, A, B, A_general, B_general, seed, scaling, dropout_p, own_gemm);
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type(), "gralora_ext: grad must have x's dtype ", x.scalar_type(),
                   ", but is ", grad.scalar_type());
  const bool one_product = own_gemm && dropout_p == 0.0;
  check_backward(grad, x, u, kept, A, B, A_general, B_general, seed, scaling, dropout_p, one_product);
  at::Tensor dx;
  if (needs[0])
    dx = one_product ? multiply(shape, grad, weight, {}, adapter_of(A, B, A_general, B_general), scaling, true)
                     : multiply_base(shape, grad, weight, {}, true, own_gemm);
  auto gradients = backward_to(one_product ? at::Tensor() : dx, true, shape, grad, x, u, kept, A, B, A_general,
                               B_general, seed, scaling, dropout_p, needs);
  if (needs[0]) std::get<0>(gradients) = dx;
  return gradients;
}

}  // namespace gralora
