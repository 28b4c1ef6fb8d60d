# SPDX-License-Identifier: Apache-2.0
"""GraLoRA as well as plain torch can: batched GEMMs on strided views, written by hand for autograd.

Nothing of T × N or T × M size is copied or allocated but the outputs, where all dtypes agree; only
the exchange copies (T × k·r). Where the activations' dtype is not the adapter's, the input is cast,
since a GEMM of torch takes one dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gralora_ext.reference import exchange


def gralora(
    x: Tensor, base: Tensor, A: Tensor, B: Tensor, *, scaling: float, dropout_p: float = 0.0, **general: Tensor | None
) -> Tensor:
    """As :func:`gralora_ext.ops.gralora`, but it writes into ``base``."""
    if dropout_p:
        x = torch.nn.functional.dropout(x, dropout_p)
    wide = x.to(A.dtype)
    y = _Blocks.apply(wide, base, A, B, scaling)
    if general.get("A_general") is not None:
        y = y.add_((wide @ general["A_general"].T) @ general["B_general"].T, alpha=scaling)
    return y


def _blocks(flat: Tensor, k: int) -> Tensor:
    """A view ``[k, T, width/k]`` of ``[..., width]``."""
    return flat.flatten(0, -2).unflatten(-1, (k, -1)).transpose(0, 1)


def _exchange(H: Tensor) -> Tensor:
    """The block exchange of ``[k, T, r]``, where the blocks come first."""
    return exchange(H.transpose(0, 1)).transpose(0, 1)


class _Blocks(torch.autograd.Function):
    """``y_j = base_j + s·U_j B_j`` with ``U = exchange(x_n A_n)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        k = A.shape[0]
        U = _exchange(torch.bmm(_blocks(x, k), A))
        out = _blocks(base, k)
        if base.dtype == B.dtype:
            out.baddbmm_(U, B, alpha=scaling)
        else:
            out.add_(torch.bmm(U, B), alpha=scaling)
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, U, A, B)
        ctx.scaling = scaling
        return base

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, U, A, B = ctx.saved_tensors
        k = A.shape[0]
        g = _blocks(grad.to(B.dtype), k)
        dB = torch.bmm(U.transpose(1, 2), g).mul_(ctx.scaling)
        dH = _exchange(torch.bmm(g, B.transpose(1, 2)).mul_(ctx.scaling))
        dA = torch.bmm(_blocks(x, k).transpose(1, 2), dH)
        dx = torch.empty_like(x)
        torch.bmm(dH, A.transpose(1, 2), out=_blocks(dx, k))
        return dx, grad, dA, dB, None
