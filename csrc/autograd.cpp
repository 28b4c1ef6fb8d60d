// SPDX-License-Identifier: Apache-2.0
// Autograd of the forward ops. It saves x itself, the parameters, U, the mask of dropout and its
// seed. Backward is an op of its own without a derivative, so that differentiating twice raises
// torch's usual error.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>

#include "checks.h"
#include "dispatched.h"
#include "ops.h"

namespace gralora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool differentiated(const at::Tensor& tensor) { return tensor.requires_grad(); }
bool differentiated(const OptionalTensor& tensor) { return tensor.has_value() && differentiated(*tensor); }
bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(0).defined(); }
bool has_tangent(const OptionalTensor& tensor) { return tensor.has_value() && has_tangent(*tensor); }

// Forward mode has no derivative here. It works without grad mode too, so that a tangent would be
// dropped in silence.
template <class... Inputs>
void check_no_tangents(const Inputs&... inputs) {
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr) return;
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(inputs) || ...),
                              "gralora_ext: forward AD (jvp) is not implemented, only backward");
}

// An optional tensor as autograd saves it, and back
at::Tensor kept(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }
OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

// Backward's op has no derivative: beyond it autograd only has to be told so, where a graph of the
// gradients is recorded.
template <class Op, class... Args>
auto call_backward(const Op& op, const Args&... args) {
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
  if (!at::GradMode::is_enabled()) guard.emplace();
  return op.call(args...);
}

// The node of a function of one output: T::backward, and what its context has saved. It is torch's
// CppNode<T>, which compiled autograd takes, but each backward there also asks for the demangled
// name of T and copies the gradients.
template <class T>
struct Recorded final : torch::autograd::CppNode<T> {
  std::string name() const override { return T::kName; }
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(this->mutex_);
    return T::backward(&this->ctx_, grads);
  }
};

// Torch 2.7 holds nodes by shared_ptr, later versions by intrusive_ptr.
template <class T, class Pointer = decltype(torch::autograd::Edge::function)>
auto new_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return std::shared_ptr<Recorded<T>>(new Recorded<T>, [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<Recorded<T>>();
}

// Before anything is written: autograd would refuse it only when it is to be kept
void check_keepable(const at::Tensor& tensor, const char* name) {
  check_given(tensor, name);
  TORCH_CHECK(!tensor.is_inference(), "gralora_ext: ", name,
              " must not be an inference tensor where a gradient is wanted: clone it, or call under torch.no_grad()");
}
void check_keepable(const OptionalTensor& tensor, const char* name) {
  if (tensor.has_value()) check_keepable(*tensor, name);
}

// Calls run(context), which saves what T::backward needs, and makes y the output of a node that
// has an edge for each input. This is what torch's Function<T>::apply does, without a description
// of each input and sets of outputs, which took twice as long as the op.
template <class T, class Run, class... Inputs>
ForwardResult record(Run&& run, const Inputs&... inputs) {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) functorch->checkSupportsCppAutogradFunction();
  const auto node = new_node<T>();
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  node->is_variable_input_.assign(sizeof...(inputs), true);
  node->ctx_.set_materialize_grads(false);
  ForwardResult result;
  {
    const at::AutoGradMode off(false);
    const at::AutoDispatchBelowADInplaceOrView guard;
    result = run(node->ctx_);
  }
  torch::autograd::set_history(std::get<0>(result), node);
  node->save_variables_to_ctx();
  return result;
}

struct Path : torch::autograd::Function<Path> {
  static constexpr const char* kName = "GraloraBackward";

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);  // of x, base, A, B, A_general, B_general; undefined where there is no gradient
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor A_general = optional(saved[3]), B_general = optional(saved[4]);
    const std::array<bool, 5> needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(2), ctx->needs_input_grad(3),
                                       ctx->needs_input_grad(4), ctx->needs_input_grad(5)};
    if (ctx->needs_input_grad(1)) result[1] = grad;
    if (!(needs[0] || needs[1] || needs[2] || needs[3] || needs[4])) return result;
    auto [dx, dA, dB, dA_general, dB_general] = call_backward(
        backward_op(), grad, saved[0], saved[5], saved[7], saved[1], saved[2], A_general, B_general, optional(saved[6]),
        ctx->saved_data["scaling"].toDouble(), ctx->saved_data["dropout_p"].toDouble(), needs);
    if (needs[0]) result[0] = dx;
    if (needs[1]) result[2] = dA;
    if (needs[2]) result[3] = dB;
    if (needs[3]) result[4] = dA_general;
    if (needs[4]) result[5] = dB_general;
    return result;
  }
};

void check_no_leaf(const at::Tensor& base) {
  const at::TensorBase& owner = base.is_view() ? base._base() : base;
  TORCH_CHECK(!(owner.is_leaf() && owner.requires_grad()),
              "gralora_ext: base is a leaf that requires grad, or a view of one, so y cannot be written into it");
}

// y as a tensor of its own on base's memory. Were it base itself, a base that is a view would
// bring CopySlices into the graph, which copies the whole gradient. It counts versions with base,
// so that what has saved it learns of later writing into base.
at::Tensor alias_of(const at::Tensor& base) {
  at::Tensor y = base.detach();
  y.unsafeGetTensorImpl()->set_version_counter(base.unsafeGetTensorImpl()->version_counter());
  return y;
}

template <bool into_base>
ForwardResult forward_recorded_or_not(const at::Tensor& x, const at::Tensor& base, const at::Tensor& A,
                                      const at::Tensor& B, const OptionalTensor& A_general,
                                      const OptionalTensor& B_general, const OptionalTensor& seed, double scaling,
                                      double dropout_p) {
  const auto run = [&] {
    return (into_base ? forward_into_op() : forward_op())
        .call(x, base, A, B, A_general, B_general, seed, scaling, dropout_p);
  };
  check_no_tangents(x, base, A, B, A_general, B_general);
  const bool recorded =
      at::GradMode::is_enabled() && (differentiated(x) || differentiated(base) || differentiated(A) ||
                                     differentiated(B) || differentiated(A_general) || differentiated(B_general));
  if (!recorded) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return run();
  }
  check_given(base, "base");
  check_keepable(x, "x"), check_keepable(A, "A"), check_keepable(B, "B"), check_keepable(seed, "seed");
  check_keepable(A_general, "A_general"), check_keepable(B_general, "B_general");
  if (into_base) check_keepable(base, "base");
  if (into_base) check_no_leaf(base);
  const auto run_and_save = [&](AutogradContext& ctx) -> ForwardResult {
    auto [y, u, mask] = run();
    ctx.save_for_backward({x, A, B, kept(A_general), kept(B_general), u, kept(seed), mask});
    ctx.saved_data["scaling"] = scaling;
    ctx.saved_data["dropout_p"] = dropout_p;
    return {into_base ? alias_of(y) : y, u, mask};
  };
  return record<Path>(run_and_save, x, base, A, B, A_general, B_general);
}

struct Linear : torch::autograd::Function<Linear> {
  static constexpr const char* kName = "GraloraLinearBackward";

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(5);  // of x, A, B, A_general, B_general
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor A_general = optional(saved[4]), B_general = optional(saved[5]);
    std::array<bool, 5> needs;
    for (size_t i = 0; i < needs.size(); i++) needs[i] = ctx->needs_input_grad(i);
    auto [dx, dA, dB, dA_general, dB_general] =
        call_backward(linear_backward_op(), grads[0], saved[0], saved[6], saved[8], saved[1], saved[2], saved[3],
                      A_general, B_general, optional(saved[7]), ctx->saved_data["scaling"].toDouble(),
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
  check_no_tangents(x, weight, bias, A, B, A_general, B_general);
  const bool recording = at::GradMode::is_enabled();
  const bool trains_weight = recording && differentiated(weight), trains_bias = recording && differentiated(bias);
  TORCH_CHECK(!trains_weight && !trains_bias, "gralora_ext: ", trains_weight ? "weight" : "bias",
              " must not require grad, since it has no derivative here");
  const auto run = [&] {
    return linear_op().call(x, weight, bias, A, B, A_general, B_general, seed, scaling, dropout_p, own_gemm);
  };
  const bool recorded = recording && (differentiated(x) || differentiated(A) || differentiated(B) ||
                                      differentiated(A_general) || differentiated(B_general));
  if (!recorded) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return run();
  }
  check_keepable(x, "x"), check_keepable(weight, "weight"), check_keepable(A, "A"), check_keepable(B, "B");
  check_keepable(A_general, "A_general"), check_keepable(B_general, "B_general"), check_keepable(seed, "seed");
  const auto run_and_save = [&](AutogradContext& ctx) {
    ForwardResult result = run();
    const auto& [y, u, mask] = result;
    ctx.save_for_backward({x, weight, A, B, kept(A_general), kept(B_general), u, kept(seed), mask});
    ctx.saved_data["scaling"] = scaling;
    ctx.saved_data["dropout_p"] = dropout_p;
    ctx.saved_data["own_gemm"] = own_gemm;
    return result;
  };
  return record<Linear>(run_and_save, x, A, B, A_general, B_general);
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
  bump_version(base);
  return result;
}

}  // namespace gralora
