// SPDX-License-Identifier: Apache-2.0
// What a layer calls at each forward in eager mode: the dispatcher's ops, as torch.ops calls them,
// and when that is right.
//
// torch.ops finds the overload by its schema, boxes each argument and wraps each result; pybind11
// looks for a signature that fits. Alone that took 5 of the 9 us of a decode step's call; in a
// model, whose products push it out of the caches, 25 of 80. Here an argument is what its place
// says.
// torch.compile, tracing and functorch do not see through these functions, so they are not for
// them.
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

// after torch's, which want to be the first to see Python's
#include "dispatched.h"
#include "eager_bindings.h"

namespace gralora {
namespace {

// The arguments of a call of `function`, by their places; `names` are the arguments'
struct Arguments {
  const char* function;
  const char* const* names;
  PyObject* const* all;
  Py_ssize_t count;

  void expect(Py_ssize_t expected) const {
    TORCH_CHECK_TYPE(count == expected, "gralora_ext: ", function, ": ", expected, " arguments were expected, but ",
                     count, " came");
  }
  const at::Tensor& tensor(int i, const char* expected = "a tensor") const {
    TORCH_CHECK_TYPE(THPVariable_Check(all[i]), "gralora_ext: ", function, ": ", names[i], " must be ", expected,
                     ", but is ", Py_TYPE(all[i])->tp_name);
    return THPVariable_Unpack(all[i]);
  }
  OptionalTensor optional(int i) const {
    return all[i] == Py_None ? OptionalTensor() : OptionalTensor(tensor(i, "a tensor or None"));
  }
  double number(int i) const {
    const double value = PyFloat_AsDouble(all[i]);
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw python_error();
    return value;
  }
  bool flag(int i) const {
    const int value = PyObject_IsTrue(all[i]);
    if (value < 0) throw python_error();
    return value == 1;
  }
};

// y of op(arguments...), called without the interpreter's lock
template <class Op, class... Args>
PyObject* call(const Op& op, const Args&... arguments) {
  at::Tensor y;
  {
    const pybind11::gil_scoped_release released;
    y = std::get<0>(op.call(arguments...));
  }
  return THPVariable_Wrap(y);
}

// (x, base, A, B, A_general, B_general, seed, scaling, dropout_p) -> y
PyObject* gralora_into(PyObject*, PyObject* const* all, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static constexpr const char* kNames[] = {"x",         "base", "A",       "B",        "A_general",
                                           "B_general", "seed", "scaling", "dropout_p"};
  const Arguments a{"gralora_into", kNames, all, count};
  a.expect(9);
  return call(forward_into_op(), a.tensor(0), a.tensor(1), a.tensor(2), a.tensor(3), a.optional(4), a.optional(5),
              a.optional(6), a.number(7), a.number(8));
  END_HANDLE_TH_ERRORS
}

// (x, weight, bias, A, B, A_general, B_general, seed, scaling, dropout_p, own_gemm) -> y
PyObject* linear(PyObject*, PyObject* const* all, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static constexpr const char* kNames[] = {"x",         "weight", "bias",    "A",         "B",       "A_general",
                                           "B_general", "seed",   "scaling", "dropout_p", "own_gemm"};
  const Arguments a{"linear", kNames, all, count};
  a.expect(11);
  return call(linear_op(), a.tensor(0), a.tensor(1), a.optional(2), a.tensor(3), a.tensor(4), a.optional(5),
              a.optional(6), a.optional(7), a.number(8), a.number(9), a.flag(10));
  END_HANDLE_TH_ERRORS
}

// (weight, A, B, A_general, B_general, scaling, fan_in_fan_out)
PyObject* merge_into(PyObject*, PyObject* const* all, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static constexpr const char* kNames[] = {"weight", "A", "B", "A_general", "B_general", "scaling", "fan_in_fan_out"};
  const Arguments a{"merge_into", kNames, all, count};
  a.expect(7);
  const at::Tensor &weight = a.tensor(0), &A = a.tensor(1), &B = a.tensor(2);
  const OptionalTensor A_general = a.optional(3), B_general = a.optional(4);
  const double scaling = a.number(5);
  const bool fan_in_fan_out = a.flag(6);
  {
    const pybind11::gil_scoped_release released;
    const at::AutoGradMode off(false);
    const at::AutoDispatchBelowADInplaceOrView guard;
    merge_op().call(weight, A, B, A_general, B_general, scaling, fan_in_fan_out);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// Whether derivatives are taken by other means than autograd's graph: by a transform of
// torch.func, or in forward mode. The ops have a backward alone, so plain torch operations take
// their place.
bool in_transform_or_forward_mode() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// Whether nothing but autograd looks at the operations of a call. Dispatch modes do (selective
// activation checkpointing keeps outputs that it may return again, a profiler counts), and so does
// tracing: an output written in place, or an operation that stands for several, would not be what
// they saw.
bool is_unobserved() {
  return c10::impl::TorchDispatchModeTLS::stack_len() == 0 && !torch::jit::tracer::isTracing() &&
         !in_transform_or_forward_mode();
}

bool is_autocast_enabled(at::DeviceType device) {
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

PyObject* needs_plain_torch(PyObject*, PyObject*) { return PyBool_FromLong(in_transform_or_forward_mode()); }

// (x, least)
PyObject* may_be_one_operation(PyObject*, PyObject* const* all, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static constexpr const char* kNames[] = {"x", "least"};
  const Arguments a{"may_be_one_operation", kNames, all, count};
  a.expect(2);
  const at::Tensor& x = a.tensor(0);
  // Where somebody looks on, sizes may be symbols.
  const bool plain =
      THPVariable_CheckExact(all[0]) && !x.is_meta() && is_unobserved() && !is_autocast_enabled(x.device().type());
  return PyBool_FromLong(plain && (!x.is_cpu() || x.numel() >= a.number(1)));
  END_HANDLE_TH_ERRORS
}

// (base, x)
PyObject* may_write_into(PyObject*, PyObject* const* all, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static constexpr const char* kNames[] = {"base", "x"};
  const Arguments a{"may_write_into", kNames, all, count};
  a.expect(2);
  const bool plain = reinterpret_cast<PyObject*>(Py_TYPE(all[0])) == THPVariableClass && THPVariable_CheckExact(all[1]);
  return PyBool_FromLong(plain && is_unobserved() && a.tensor(0).is_contiguous() &&
                         !a.tensor(0).is_alias_of(a.tensor(1)));
  END_HANDLE_TH_ERRORS
}

PyCFunction by_place(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}  // namespace

PyMethodDef eager_methods[] = {
    {"gralora_into", by_place(&gralora_into), METH_FASTCALL,
     "torch.ops.gralora_ext.gralora_ by position, its first result alone. For eager mode, where may_write_into says "
     "so."},
    {"linear", by_place(&linear), METH_FASTCALL,
     "torch.ops.gralora_ext.linear by position, its first result alone. For eager mode, where may_be_one_operation "
     "says so."},
    {"merge_into", by_place(&merge_into), METH_FASTCALL,
     "torch.ops.gralora_ext.merge_ by position, of which autograd learns nothing."},
    {"needs_plain_torch", &needs_plain_torch, METH_NOARGS,
     "Whether a transform of torch.func or forward-mode differentiation is on, for which the ops have no rule."},
    {"may_be_one_operation", by_place(&may_be_one_operation), METH_FASTCALL,
     "Whether x is a plain tensor, with `least` elements or more if it is on the CPU, and there is no autocast, no "
     "dispatch mode, no tracing, and needs_plain_torch is false."},
    {"may_write_into", by_place(&may_write_into), METH_FASTCALL,
     "Whether y may take the memory of the first tensor, beside the second, x: tensors proper, contiguous, apart, with "
     "no dispatch mode, no tracing, and needs_plain_torch false."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace gralora
