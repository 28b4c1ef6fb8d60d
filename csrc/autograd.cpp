// Autograd of the forward op. Saved: x itself where dA is wanted, U where dB is, the parameters, the seed; nothing else.
// Backward is an op of its own without a derivative, so differentiating twice raises torch's usual error.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace gralora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

auto forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gralora_ext::gralora", "").typed<decltype(forward_cpu)>();
  return op;
}

auto backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gralora_ext::gralora_backward", "")
                             .typed<decltype(backward_cpu)>();
  return op;
}

// Backward or forward mode: the latter has no derivative here, and goes the recorded way to get torch's error for it.
bool differentiated(const at::Tensor& tensor) { return tensor.requires_grad() || tensor._fw_grad(0).defined(); }
bool differentiated(const OptionalTensor& tensor) { return tensor.has_value() && differentiated(*tensor); }

OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

struct Gralora : torch::autograd::Function<Gralora> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& base, const at::Tensor& A,
                               const at::Tensor& B, const OptionalTensor& A_general, const OptionalTensor& B_general,
                               const OptionalTensor& seed, double scaling, double dropout_p) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, u] = forward_op().call(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
    const auto kept = [](const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); };
    ctx->save_for_backward({x, A, B, kept(A_general), kept(B_general), u, kept(seed)});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->mark_non_differentiable({u});
    ctx->set_materialize_grads(false);
    return {y, u};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(9);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor A_general = optional(saved[3]), B_general = optional(saved[4]);
    const bool hybrid = A_general.has_value();
    const std::array<bool, 5> needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(2), ctx->needs_input_grad(3),
                                       hybrid && ctx->needs_input_grad(4), hybrid && ctx->needs_input_grad(5)};
    if (ctx->needs_input_grad(1)) result[1] = grad;
    if (!(needs[0] || needs[1] || needs[2] || needs[3] || needs[4])) return result;
    auto [dx, dA, dB, dA_general, dB_general] =
        backward_op().call(grad, saved[0], saved[5], saved[1], saved[2], A_general, B_general, optional(saved[6]),
                           ctx->saved_data["scaling"].toDouble(), ctx->saved_data["dropout_p"].toDouble(), needs);
    if (needs[0]) result[0] = dx;
    if (needs[1]) result[2] = dA;
    if (needs[2]) result[3] = dB;
    if (needs[3]) result[4] = dA_general;
    if (needs[4]) result[5] = dB_general;
    return result;
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> forward_autograd(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A,
                                                    const at::Tensor& B, const OptionalTensor& A_general,
                                                    const OptionalTensor& B_general, const OptionalTensor& seed,
                                                    double scaling, double dropout_p) {
  const bool recorded =
      at::GradMode::is_enabled() && (differentiated(x) || differentiated(base) || differentiated(A) ||
                                     differentiated(B) || differentiated(A_general) || differentiated(B_general));
  if (!recorded) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().call(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
  }
  const variable_list outputs = Gralora::apply(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
  return {outputs[0], outputs[1]};
}

}  // namespace gralora
