# SPDX-License-Identifier: Apache-2.0
"""The argument checks of ``csrc/checks.h`` in Python, for calls that its kernels do not see.

These are the fake kernels, which torch also picks for tensors on ``meta``, and the plain torch
operations that take the kernels' places (:mod:`gralora_ext.kernels`). Order, types and words are
those of the C++ checks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_adapter(
    A: Tensor, B: Tensor, A_general: Tensor | None, B_general: Tensor | None, scaling: float
) -> tuple[int, int]:
    """Checks the parameters among themselves and returns N and M.

    Raises:
        ValueError, TypeError: as :func:`gralora_ext.ops.gralora`.
    """
    _check_given(A, "A")
    _check_tensor(A, "A", A.device)
    _check_tensor(B, "B", A.device)
    if A.dim() != 3:
        raise ValueError(f"gralora_ext: A must be [k, N/k, r], but has shape {list(A.shape)}")
    if B.dim() != 3:
        raise ValueError(f"gralora_ext: B must be [k, r, M/k], but has shape {list(B.shape)}")
    (k, width, r), M = A.shape, B.shape[0] * B.shape[2]
    N = k * width
    if A.numel() == 0:
        raise ValueError(f"gralora_ext: A must have k, N/k and r of at least 1, but has shape {list(A.shape)}")
    if r % k != 0:
        raise ValueError(f"gralora_ext: the rank r of A must be divisible by k, but r is {r} and k is {k}")
    if B.shape[0] != k or B.shape[1] != r or B.shape[2] == 0:
        raise ValueError(
            f"gralora_ext: B must be [k, r, M/k] = [{k}, {r}, M/k] to go with A of shape {list(A.shape)}, "
            f"but has shape {list(B.shape)}"
        )
    if B.dtype != A.dtype:
        raise TypeError(f"gralora_ext: B must have A's dtype {A.dtype}, but is {B.dtype}")
    if A_general is None or B_general is None:
        missing = "A_general" if A_general is None else "B_general"
        if A_general is not B_general:
            raise ValueError(f"gralora_ext: A_general and B_general must be given together, but {missing} is None")
    else:
        _check_tensor(A_general, "A_general", A.device)
        _check_tensor(B_general, "B_general", A.device)
        if A_general.dim() != 2 or A_general.shape[0] == 0 or A_general.shape[1] != N:
            raise ValueError(f"gralora_ext: A_general must be [h, N] = [h, {N}], but has shape {list(A_general.shape)}")
        h = A_general.shape[0]
        if B_general.dim() != 2 or B_general.shape[0] != M or B_general.shape[1] != h:
            raise ValueError(
                f"gralora_ext: B_general must be [M, h] = [{M}, {h}], but has shape {list(B_general.shape)}"
            )
        if A_general.dtype != A.dtype or B_general.dtype != A.dtype:
            raise TypeError(
                f"gralora_ext: A_general and B_general must have A's dtype {A.dtype}, "
                f"but are {A_general.dtype} and {B_general.dtype}"
            )
    if not math.isfinite(scaling):
        raise ValueError(f"gralora_ext: scaling must be finite, but is {scaling}")
    return N, M


def check_forward(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> None:
    """The checks of :func:`gralora_ext.ops.gralora`."""
    N, M = check_adapter(A, B, A_general, B_general, scaling)
    _check_activation(x, "x", N, "N", A.device)
    _check_activation(base, "base", M, "M", A.device)
    if x.shape[:-1] != base.shape[:-1]:
        raise ValueError(
            f"gralora_ext: base must have x's leading dimensions, but x has shape {list(x.shape)} "
            f"and base has shape {list(base.shape)}"
        )
    _check_dropout(dropout_p, seed, A.device)


def check_linear(
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
) -> None:
    """The checks of :func:`gralora_ext.ops.linear`."""
    N, M = check_adapter(A, B, A_general, B_general, scaling)
    _check_activation(x, "x", N, "N", A.device)
    if own_gemm and x.device.type not in ("cpu", "meta"):
        raise ValueError(f"gralora_ext: with own_gemm all tensors must be on the CPU, but x is on {x.device}")
    sums_are_xs = x.dtype == torch.float64 or (x.dtype == torch.float32 and A.dtype != torch.float64)
    if own_gemm and not sums_are_xs:
        raise TypeError(
            f"gralora_ext: with own_gemm x must be float32, or float64 where A is, "
            f"but x is {x.dtype} and A is {A.dtype}"
        )
    _check_tensor(weight, "weight", A.device)
    if weight.dim() != 2 or weight.shape[0] != M or weight.shape[1] != N:
        raise ValueError(
            f"gralora_ext: weight must be [M, N] = [{M}, {N}] to go with A and B, but has shape {list(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"gralora_ext: weight must have x's dtype {x.dtype}, but is {weight.dtype}")
    if bias is not None:
        _check_tensor(bias, "bias", A.device)
        if bias.dim() != 1 or bias.shape[0] != M:
            raise ValueError(f"gralora_ext: bias must be [M] = [{M}] to go with B, but has shape {list(bias.shape)}")
        if bias.dtype != x.dtype:
            raise TypeError(f"gralora_ext: bias must have x's dtype {x.dtype}, but is {bias.dtype}")
    _check_dropout(dropout_p, seed, A.device)


def check_merge(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    scaling: float,
    fan_in_fan_out: bool,
) -> None:
    """The checks of :func:`gralora_ext.ops.merge_`, but those of overlapping memory."""
    N, M = check_adapter(A, B, A_general, B_general, scaling)
    _check_tensor(weight, "weight", A.device)
    rows, columns = (N, M) if fan_in_fan_out else (M, N)
    if weight.dim() != 2 or weight.shape[0] != rows or weight.shape[1] != columns:
        raise ValueError(
            f"gralora_ext: weight must be {'[N, M]' if fan_in_fan_out else '[M, N]'} = [{rows}, {columns}] "
            "to go with A and B, "
            f"but has shape {list(weight.shape)}"
        )


def _check_given(tensor: Tensor | None, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"gralora_ext: {name} must be a tensor, but is {'None' if tensor is None else type(tensor).__name__}"
        )


def _check_tensor(tensor: Tensor, name: str, device: torch.device) -> None:
    _check_given(tensor, name)
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"gralora_ext: {name} must be float32, bfloat16, float16 or float64, but is {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"gralora_ext: {name} must be a dense tensor, but its layout is {tensor.layout}")
    if tensor.device != device:
        raise ValueError(
            f"gralora_ext: all tensors must be on one device, but {name} is on {tensor.device} "
            f"where {device} was expected"
        )


def _check_activation(tensor: Tensor, name: str, width: int, width_name: str, device: torch.device) -> None:
    _check_tensor(tensor, name, device)
    if tensor.dim() == 0 or tensor.shape[-1] != width:
        raise ValueError(
            f"gralora_ext: {name} must be [..., {width_name}] = [..., {width}] to go with A and B, "
            f"but has shape {list(tensor.shape)}"
        )


def _check_dropout(p: float, seed: Tensor | None, device: torch.device) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"gralora_ext: dropout_p must be in [0, 1), but is {p}")
    if p == 0.0:
        return
    if seed is None:
        raise ValueError("gralora_ext: seed must be given where dropout_p is not 0, but is None")
    if seed.dtype != torch.int64:
        raise TypeError(f"gralora_ext: seed must be int64, but is {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"gralora_ext: seed must have one element, but has shape {list(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"gralora_ext: seed must be on {device}, but is on {seed.device}")
