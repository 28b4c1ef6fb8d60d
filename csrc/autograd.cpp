// Autograd of the forward op. Saved: x itself where dA is wanted, U where dB is, the mask of dropout, the parameters, the seed;
// nothing else.
// Backward is an op of its own without a derivative, so differentiating twice raises torch's usual error.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "ops.h"

namespace gralora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Kernel>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Kernel>();
}

auto forward_op() {
  static const auto op = find_op<decltype(forward_kernel)>("gralora_ext::gralora");
  return op;
}

auto forward_into_op() {
  static const auto op = find_op<decltype(forward_into_kernel)>("gralora_ext::gralora_");
  return op;
}

auto backward_op() {
  static const auto op = find_op<decltype(backward_kernel)>("gralora_ext::gralora_backward");
  return op;
}

auto linear_op() {
  static const auto op = find_op<decltype(linear_kernel)>("gralora_ext::linear");
  return op;
}

auto linear_backward_op() {
  static const auto op = find_op<decltype(linear_backward_kernel)>("gralora_ext::linear_backward");
  return op;
}

// Backward or forward mode: the latter has no derivative here, and goes the recorded way to get torch's error for it.
bool differentiated(const at::Tensor& tensor) { return tensor.requires_grad() || tensor._fw_grad(0).defined(); }
bool differentiated(const OptionalTensor& tensor) { return tensor.has_value() && differentiated(*tensor); }

// An optional tensor as autograd saves it, and back
at::Tensor kept(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }
OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

template <bool into_base>
struct Gralora : torch::autograd::Function<Gralora<into_base>> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& base, const at::Tensor& A,
                            const at::Tensor& B, const OptionalTensor& A_general, const OptionalTensor& B_general,
                            const OptionalTensor& seed, double scaling, double dropout_p, at::Tensor* u_out,
                            at::Tensor* mask_out) {
    // u and the mask are handed out beside autograd: as further outputs they would have to be marked and unpacked for every call.
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, u, mask] = (into_base ? forward_into_op() : forward_op())
                            .call(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
    ctx->save_for_backward({x, A, B, kept(A_general), kept(B_general), u, kept(seed), mask});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    *u_out = u, *mask_out = mask;
    // A tensor of its own on base's memory: were it base itself, a base that is a view would bring CopySlices into the
    // graph, which copies the whole gradient.
    return into_base ? y.detach() : y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(11);  // one per argument of forward; undefined where there is no gradient
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor A_general = optional(saved[3]), B_general = optional(saved[4]);
    const bool hybrid = A_general.has_value();
    const std::array<bool, 5> needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(2), ctx->needs_input_grad(3),
                                       hybrid && ctx->needs_input_grad(4), hybrid && ctx->needs_input_grad(5)};
    if (ctx->needs_input_grad(1)) result[1] = grad;
    if (!(needs[0] || needs[1] || needs[2] || needs[3] || needs[4])) return result;
    auto [dx, dA, dB, dA_general, dB_general] = backward_op().call(
        grad, saved[0], saved[5], saved[7], saved[1], saved[2], A_general, B_general, optional(saved[6]),
        ctx->saved_data["scaling"].toDouble(), ctx->saved_data["dropout_p"].toDouble(), needs);
    if (needs[0]) result[0] = dx;
    if (needs[1]) result[2] = dA;
    if (needs[2]) result[3] = dB;
    if (needs[3]) result[4] = dA_general;
    if (needs[4]) result[5] = dB_general;
    return result;
  }
};

template <bool into_base>
ForwardResult forward_recorded_or_not(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A,
                                      const at::Tensor& B, const OptionalTensor& A_general,
                                      const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
                                      double dropout_p) {
  const bool recorded =
      at::GradMode::is_enabled() && (differentiated(x) || differentiated(base) || differentiated(A) ||
                                     differentiated(B) || differentiated(A_general) || differentiated(B_general));
  if (!recorded) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return (into_base ? forward_into_op() : forward_op())
        .call(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
  }
  check_given(x, "x"), check_given(base, "base"), check_given(A, "A"), check_given(B, "B");
  TORCH_CHECK(!(into_base && base.is_leaf() && base.requires_grad()),
              "gralora_ext: base is a leaf that requires grad, so y cannot be written into it");
  at::Tensor u, mask;
  const at::Tensor y =
      Gralora<into_base>::apply(x, base, A, B, A_general, B_general, seed, scaling, dropout_p, &u, &mask);
  return {y, u, mask};
}

struct Linear : torch::autograd::Function<Linear> {
  // What may have a gradient comes first: torch numbers only the tensors that are there.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B,
                            const OptionalTensor& A_general, const OptionalTensor& B_general, const at::Tensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& seed, double scaling, double dropout_p,
                            bool own_gemm, at::Tensor* u_out, at::Tensor* mask_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, u, mask] =
        linear_op().call(x, weight, bias, A, B, A_general, B_general, seed, scaling, dropout_p, own_gemm);
    ctx->save_for_backward({x, weight, A, B, kept(A_general), kept(B_general), u, kept(seed), mask});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["own_gemm"] = own_gemm;
    *u_out = u, *mask_out = mask;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(13);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor A_general = optional(saved[4]), B_general = optional(saved[5]);
    const bool hybrid = A_general.has_value();
    const std::array<bool, 5> needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                                       hybrid && ctx->needs_input_grad(3), hybrid && ctx->needs_input_grad(4)};
    auto [dx, dA, dB, dA_general, dB_general] =
        linear_backward_op().call(grads[0], saved[0], saved[6], saved[8], saved[1], saved[2], saved[3], A_general,
                                  B_general, optional(saved[7]), ctx->saved_data["scaling"].toDouble(),
                                  ctx->saved_data["dropout_p"].toDouble(), ctx->saved_data["own_gemm"].toBool(), needs);
    if (needs[0]) result[0] = dx;
    if (needs[1]) result[1] = dA;
    if (needs[2]) result[2] = dB;
    if (needs[3]) result[3] = dA_general;
    if (needs[4]) result[4] = dB_general;
    return result;
  }
};

}  // namespace

ForwardResult linear_autograd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                              const at::Tensor& A, const at::Tensor& B, const OptionalTensor& A_general,
                              const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
                              double dropout_p, bool own_gemm) {
  const bool frozen = !(differentiated(weight) || differentiated(bias));
  TORCH_CHECK(!at::GradMode::is_enabled() || frozen,
              "gralora_ext: weight and bias must not require grad: they have no derivative here");
  const bool recorded = at::GradMode::is_enabled() && (differentiated(x) || differentiated(A) || differentiated(B) ||
                                                       differentiated(A_general) || differentiated(B_general));
  if (!recorded) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return linear_op().call(x, weight, bias, A, B, A_general, B_general, seed, scaling, dropout_p, own_gemm);
  }
  check_given(x, "x"), check_given(weight, "weight"), check_given(A, "A"), check_given(B, "B");
  at::Tensor u, mask;
  const at::Tensor y =
      Linear::apply(x, A, B, A_general, B_general, weight, bias, seed, scaling, dropout_p, own_gemm, &u, &mask);
  return {y, u, mask};
}

ForwardResult forward_autograd(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A, const at::Tensor& B,
                               const OptionalTensor& A_general, const OptionalTensor& B_general,
                               const OptionalTensor& seed, double scaling, double dropout_p) {
  return forward_recorded_or_not<false>(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
}

ForwardResult forward_into_autograd(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A,
                                    const at::Tensor& B, const OptionalTensor& A_general,
                                    const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
                                    double dropout_p) {
  auto result = forward_recorded_or_not<true>(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
  // What has saved base for its backward gets torch's error, as with any in-place operation.
  if (!base.is_inference()) base.unsafeGetTensorImpl()->bump_version();
  return result;
}

}  // namespace gralora
