# SPDX-License-Identifier: Apache-2.0
"""Loads the extension and tells torch what it cannot see: shapes, FLOPs, and what is for eager mode only.

The autograd of the forward op is in C++ (``csrc/autograd.cpp``): a Python one would cost more than a decode step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _flops  # noqa: F401  registers what the ops cost
from ._checks import check_adapter, check_forward, check_linear, check_merge
from ._loader import load

_native = load()


# What the layers ask of the native module in eager mode, as torch.compile sees it.


@torch.compiler.substitute_in_graph(_native.may_write_into, skip_signature_check=True)
def _(base: Tensor, x: Tensor) -> bool:
    return False  # the compiler chooses the buffers


@torch.compiler.assume_constant_result  # the compiler is in the transform while it traces one
def _in_a_transform() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


@torch.compiler.substitute_in_graph(_native.needs_plain_torch, skip_signature_check=True)
def _() -> bool:
    return _in_a_transform()


@torch.compiler.substitute_in_graph(_native.may_be_one_operation, skip_signature_check=True)
def _(x: Tensor, least: int) -> bool:
    """Whatever the number of tokens, so that one graph serves them all; an exported program keeps the base layer."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return kind != "meta" and not (torch.compiler.is_exporting() or autocast or _in_a_transform())


@torch.compiler.substitute_in_graph(_native.linear, skip_signature_check=True)
def _(*arguments: Any) -> Tensor:
    return torch.ops.gralora_ext.linear.default(*arguments)[0]


def _check_devices(**tensors: Tensor | None) -> None:
    """A fake kernel is also what torch picks where one of several tensors is on meta: then nothing would be computed."""
    for name, t in tensors.items():
        if t is None and name not in ("bias", "A_general", "B_general", "seed"):
            raise TypeError(f"gralora_ext: {name} must be a tensor, but is None")
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    expected = devices["A"]
    for name, device in devices.items():
        if device != expected:
            raise ValueError(
                f"gralora_ext: all tensors must be on one device, but {name} is on {device} where {expected} was expected"
            )


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _dtype_of_u(*tensors: Tensor) -> torch.dtype:
    """As dtype_of_u in csrc/ops.cpp."""
    if any(t.dtype == torch.float64 for t in tensors):
        return torch.float64
    all_bf16 = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)
    return torch.bfloat16 if all_bf16 else torch.float32


def _ranks(A: Tensor, A_general: Tensor | None) -> int:
    return A.shape[0] * A.shape[2] + (0 if A_general is None else A_general.shape[0])


def _kept_u(x: Tensor, base: Tensor, A: Tensor, A_general: Tensor | None) -> Tensor:
    """As keeps_u in csrc/params.h."""
    ranks = _ranks(A, A_general)
    keeps = x.element_size() > 2 or A.element_size() <= 2 or 16 * ranks <= x.shape[-1] + ranks
    return x.new_empty((_tokens(x) if keeps else 0, ranks), dtype=_dtype_of_u(x, base, A))


def _kept_mask(x: Tensor, k: int, dropout_p: float) -> Tensor:
    """As keeps_mask in csrc/ops.cpp."""
    keeps = x.device.type == "cpu" and dropout_p > 0.0 and x.shape[-1] // k % 8 == 0
    return x.new_empty((_tokens(x) if keeps else 0, x.shape[-1] // 8), dtype=torch.uint8)


@torch.library.register_fake("gralora_ext::gralora")
def _fake_forward(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_forward(x, base, A, B, A_general, B_general, seed, scaling, dropout_p)
    return torch.empty_like(base), _kept_u(x, base, A, A_general), _kept_mask(x, A.shape[0], dropout_p)


@torch.library.register_fake("gralora_ext::gralora_")
def _(x: Tensor, base: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return base, *_fake_forward(x, base, *others)[1:]


def _empty_gradient(wanted: bool, of: Tensor | None, A: Tensor) -> Tensor:
    return torch.empty_like(of) if wanted and of is not None else (A if of is None else of).new_empty(0)


@torch.library.register_fake("gralora_ext::gralora_backward")
def _(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    kept: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    _check_devices(grad=grad, x=x, u=u, kept=kept, A=A, B=B, A_general=A_general, B_general=B_general, seed=seed)

    return tuple(_empty_gradient(n, t, A) for n, t in zip(needs, (x, A, B, A_general, B_general), strict=True))


@torch.library.register_fake("gralora_ext::linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    own_gemm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_linear(x, weight, bias, A, B, A_general, B_general, seed, scaling, dropout_p, own_gemm)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    one_product = own_gemm and dropout_p == 0.0
    u = x.new_empty((0, _ranks(A, A_general))) if one_product else _kept_u(x, y, A, A_general)
    return y, u, _kept_mask(x, A.shape[0], dropout_p)


@torch.library.register_fake("gralora_ext::linear_backward")
def _(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    kept: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    own_gemm: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    _check_devices(
        grad=grad, x=x, u=u, kept=kept, weight=weight, A=A, B=B, A_general=A_general, B_general=B_general, seed=seed
    )
    dx = x.new_empty(x.shape) if needs[0] else x.new_empty(0)
    return dx, *(_empty_gradient(n, t, A) for n, t in zip(needs[1:], (A, B, A_general, B_general), strict=True))


@torch.library.register_fake("gralora_ext::merge_")
def _(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    scaling: float,
    fan_in_fan_out: bool,
) -> None:
    check_merge(weight, A, B, A_general, B_general, scaling, fan_in_fan_out)


@torch.library.register_fake("gralora_ext::delta_weight")
def _(
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    scaling: float,
    fan_in_fan_out: bool,
) -> Tensor:
    N, M = check_adapter(A, B, A_general, B_general, scaling)
    return A.new_empty((N, M) if fan_in_fan_out else (M, N))
