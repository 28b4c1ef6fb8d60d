// SPDX-License-Identifier: Apache-2.0
// The ops through torch's dispatcher, from C++: registered, differentiable, and equal to the formula in torch's own ops.
// usage: test_ops LIBRARY, the library that registers them.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdio>
#include <tuple>

#include "check.h"
#include "ops.h"

namespace {

constexpr int64_t k = 2, r = 4, N = 12, M = 20;
constexpr double kScaling = 0.5;

template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// dW [M, N]: einsum over the blocks' ranks, as in reference.py.
at::Tensor dense(const at::Tensor& A, const at::Tensor& B) {
  const at::Tensor blocks = at::einsum("nijq,jnqo->joni", {A.unflatten(2, {k, r / k}), B.unflatten(1, {k, r / k})});
  return kScaling * blocks.reshape({M, N});
}

double error(const at::Tensor& got, const at::Tensor& want) {
  return ((got - want).norm() / want.norm()).item<double>();
}

void test_forward_and_gradients() {
  const auto options = at::TensorOptions().dtype(at::kDouble);
  const at::Tensor x = at::randn({2, 3, N}, options).requires_grad_(), base = at::randn({2, 3, M}, options);
  const at::Tensor A = at::randn({k, N / k, r}, options).requires_grad_();
  const at::Tensor B = at::randn({k, r, M / k}, options).requires_grad_();

  const auto forward = op<decltype(gralora::forward_kernel)>("gralora_ext::gralora");
  const at::Tensor y = std::get<0>(forward.call(x, base, A, B, {}, {}, {}, kScaling, 0.0));
  const at::Tensor want = base + at::matmul(x, dense(A, B).t());
  EXPECT(error(y, want) < 1e-13);

  const at::Tensor g = at::randn_like(y);
  y.backward(g);
  const at::Tensor dx = x.grad().clone(), dA = A.grad().clone(), dB = B.grad().clone();
  for (const at::Tensor& leaf : {x, A, B}) leaf.mutable_grad().zero_();
  want.backward(g);
  EXPECT(error(dx, x.grad()) < 1e-13);
  EXPECT(error(dA, A.grad()) < 1e-13);
  EXPECT(error(dB, B.grad()) < 1e-13);
}

void test_merge_is_in_place() {
  const at::Tensor A = at::randn({k, N / k, r}), B = at::randn({k, r, M / k}), weight = at::randn({M, N});
  const at::Tensor want = weight + dense(A, B);
  const auto version = weight._version();
  op<decltype(gralora::merge_kernel)>("gralora_ext::merge_").call(weight, A, B, {}, {}, kScaling, false);
  EXPECT(error(weight, want) < 1e-6);
  EXPECT(weight._version() == version + 1);
}

void test_delta_weight() {
  const at::Tensor A = at::randn({k, N / k, r}), B = at::randn({k, r, M / k});
  const auto delta_weight = op<decltype(gralora::delta_weight_kernel)>("gralora_ext::delta_weight");
  EXPECT(error(delta_weight.call(A, B, {}, {}, kScaling, false), dense(A, B)) < 1e-6);
  EXPECT(error(delta_weight.call(A, B, {}, {}, kScaling, true), dense(A, B).t()) < 1e-6);
}

}  // namespace

int main(int, char** argv) {
  if (dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) == nullptr) {
    std::printf("%s\n", dlerror());
    return 1;
  }
  test_forward_and_gradients();
  test_merge_is_in_place();
  test_delta_weight();
  return check::result();
}
