# SPDX-License-Identifier: Apache-2.0
"""When a frozen base layer and its adapter are one operation, :func:`gralora_ext.ops.linear`, and the base layer is not called.

In training torch multiplies by W as the base layer would, and both dx meet in one tensor, where autograd would add two: on CUDA
devices that have kernels, and for many tokens on a CPU. Where our GEMM is quicker than torch's, on a CPU, it takes a float32 layer
of many tokens, in inference too: one product with W + ΔW, or with dropout in training, where W + ΔW is not what multiplies x, the
layer's own product.

Either is right only where calling the base layer would do nothing but multiply. Everything else goes through the base layer:
quantized, offloaded, hooked, trained and subclassed ones, and those whose tensors are of a subclass, such as DTensor.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module
from transformers.pytorch_utils import Conv1D

from .. import kernels
from .._loader import load

if TYPE_CHECKING:
    from .layer import GraloraLinear

_native = load()
_TOKENS: int = _native.tokens_for_one_operation()
_IS_QUICKER: bool = _native.one_product_is_quicker() and torch.backends.mkl.is_available()
_TENSORS = (Tensor, nn.Parameter)  # no subclass of a library's
_HOOKS_EVERYWHERE = (  # torch fills them and never puts others in their place
    module._global_forward_hooks,
    module._global_forward_pre_hooks,
    module._global_backward_hooks,
    module._global_backward_pre_hooks,
)
_MATMUL = getattr(torch.backends.mkldnn, "matmul", None)  # its settings, from torch 2.9 on
# A patched class is called, whether it was patched after this import or before.
_FORWARDS = {
    kind: kind.forward
    for kind in (nn.Linear, Conv1D)
    if getattr(kind.forward, "__code__", None) and kind.forward.__code__.co_filename == inspect.getsourcefile(kind)
}


def how_to_multiply(layer: GraloraLinear, x: Tensor) -> tuple[str, bool] | None:
    """The adapter with which ``layer`` is one operation for ``x``, and whether by our GEMM; None: its base layer is to be called.

    It is asked at every call, so what is cheap and often false comes first, and nothing is called that can be looked up: beside a
    model's products and activations the interpreter's own data are in no cache, and a call of a Python function costs some 3 µs.
    Nothing is compiled there, cast or looked at, since the base layer's operations are torch's own; under torch.compile the
    layer is one operation in training, whatever the number of tokens.
    """
    if not _native.may_be_one_operation(x, _TOKENS * layer.in_features):
        return None
    dtype, trains = x.dtype, x.requires_grad and torch.is_grad_enabled()
    quicker = _IS_QUICKER and dtype == torch.float32 and x.is_cpu
    compiles = torch.compiler.is_compiling()
    if not (trains or (quicker and not compiles)):
        return None
    modules = layer._modules
    if not _is_frozen_layer(modules["base_layer"], dtype, x.device) or not (x.is_cpu or kernels.has_kernels(x.device)):
        return None
    name, adapters = layer._active_adapter, modules["gralora_A"]._parameters
    if type(adapters) is not dict:  # an engine's, which gathers what is read
        return None
    if type(name) is not str:
        names = [each for each in name if each in adapters]
        if len(names) != 1:
            return None
        (name,) = names
    elif name not in adapters:
        return None
    if not is_fused_dropout(modules["gralora_dropout"]._modules[name]):
        return None
    if layer.hybrid_r[name] > 0 and not (
        only_multiplies(modules["gralora_A_general"]._modules[name])
        and only_multiplies(modules["gralora_B_general"]._modules[name])
    ):
        return None
    # A graph serves all numbers of tokens: it is made for the least of which it is true that there
    # are many.
    tokens = _TOKENS if compiles else x.numel() // layer.in_features
    if quicker and _multiplies_in_full_precision() and _pays(layer, name, tokens):
        return name, True
    return (name, False) if trains else None


def _pays(layer: GraloraLinear, name: str, tokens: int) -> bool:
    """Whether our GEMM is right for the adapter, and making W + ΔW, 2NM(r/k + h) FLOPs, takes few enough.

    That is at most half of the FLOPs of torch's product and the path together, 2NM·tokens·(1 + share).
    """
    modules, h = layer._modules, layer.hybrid_r[name]
    if modules["gralora_A"]._parameters[name].dtype == torch.float64:  # sums would be in float64
        return False
    dropout = modules["gralora_dropout"]._modules[name]
    if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p != 0.0:
        return True  # W stays without ΔW
    r = layer.r[name]
    share = (r + h) * (1 / layer.in_features + 1 / layer.out_features)
    return 2 * (r / layer.gralora_k[name] + h) <= tokens * (1 + share)


def is_fused_dropout(dropout: nn.Module) -> bool:
    """Whether the kernels draw the mask of ``dropout``; another module of a user's, and one that drops all, is called."""
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and dropout.p < 1.0)


def weight_of(base: nn.Module) -> Tensor:
    """The weight of an eligible base layer as ``[M, N]``."""
    weight: Tensor = base._parameters["weight"]  # type: ignore[assignment]  # an eligible layer has one
    return weight.t() if type(base) is Conv1D else weight


@torch.compiler.assume_constant_result  # a graph keeps what held when it was made
def _multiplies_in_full_precision() -> bool:
    if _MATMUL is None:
        return torch.get_float32_matmul_precision() == "highest"
    return _MATMUL.fp32_precision in ("none", "ieee")


def has_librarys_forward(linear: nn.Module) -> bool:
    """Whether ``linear`` is a Linear or Conv1D proper, with the forward that torch or transformers gave it."""
    kind = type(linear)
    return kind in _FORWARDS and kind.forward is _FORWARDS[kind] and "forward" not in linear.__dict__


def only_multiplies(linear: nn.Module) -> bool:
    """Whether calling ``linear``, a plain Linear or Conv1D, does nothing but multiply by the tensors that it holds.

    Not so where an engine or a user has wrapped, hooked or patched it, or where its tensors are a library's own.
    """
    if not has_librarys_forward(linear):
        return False
    own = linear.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    forward, forward_pre, backward, backward_pre = _HOOKS_EVERYWHERE
    if hooked or forward or forward_pre or backward or backward_pre:
        return False
    parameters = own["_parameters"]
    return type(parameters) is dict and type(parameters.get("weight")) in _TENSORS


def _is_frozen_layer(base: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether calling ``base`` is ``x Wᵀ + bias`` with tensors like x that need no gradient, and nothing beside it."""
    if not only_multiplies(base):
        return False
    parameters = base.__dict__["_parameters"]
    bias = parameters.get("bias")
    return _is_frozen(parameters["weight"], dtype, device) and (bias is None or _is_frozen(bias, dtype, device))


def _is_frozen(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    return (
        type(parameter) in _TENSORS
        and parameter.dtype == dtype
        and parameter.device == device
        and parameter.layout == torch.strided
        and not (parameter.requires_grad and torch.is_grad_enabled())
    )
