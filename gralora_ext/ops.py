# SPDX-License-Identifier: Apache-2.0
"""The contract of the operations; shapes, dtypes and devices are checked by the C++ ops (``csrc/checks.h``).

Where these have no kernel or no derivative (:mod:`gralora_ext.kernels`), plain torch operations do the same.

Letters: T tokens (all leading dimensions of x), N in_features, M out_features, k the grid, r the rank, rb = r/k,
h the rank of the plain LoRA beside it, s the scaling. Source of the method: GraLoRA, arXiv 2505.20355.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import _registrations, kernels, reference  # noqa: F401  the first registers what torch must know of the ops
from ._checks import check_adapter, check_forward, check_linear, check_merge
from .reference import draw_seed

_gralora = torch.ops.gralora_ext.gralora.default
_gralora_ = torch.ops.gralora_ext.gralora_.default
_linear = torch.ops.gralora_ext.linear.default
_merge_ = torch.ops.gralora_ext.merge_.default
_delta_weight = torch.ops.gralora_ext.delta_weight.default


def gralora(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Adds the GraLoRA path of ``x`` to ``base``; differentiable in all tensors.

    ``H[t,n,c] = Σ_i x[t, n·N/k+i] A[n,i,c]``, ``U[t,j,n·rb+q] = H[t,n,j·rb+q]``,
    ``y[t, j·M/k+o] = base[t, j·M/k+o] + s Σ_c U[t,j,c] B[j,c,o] (+ s (x Agᵀ) Bgᵀ)``.

    Args:
        x: ``[..., N]``, any rank ≥ 1, any strides; float32, bfloat16, float16 or float64.
        base: ``[..., M]`` with x's leading dimensions; the output of the frozen layer.
        A: ``[k, N/k, r]``.
        B: ``[k, r, M/k]``, in A's dtype.
        scaling: s, a plain number.
        A_general: ``[h, N]``, or None where h = 0; in A's dtype.
        B_general: ``[M, h]``, or None where h = 0; in A's dtype.
        dropout_p: probability in [0, 1) of zeroing an element of x; the others are scaled by 1/(1 - p).
        training: dropout is applied only where this is true.

    Returns:
        y ``[..., M]`` in base's dtype. Sums are taken in float32 (float64 where a tensor is float64), rounded once;
        where x, y, A and B are all bfloat16, from 5 tokens on, processors that multiply pairs (AMX, AVX512-BF16) round the ranks
        ``x A`` too, as PEFT does. Where x and y are bfloat16 and the adapter is not, AMX, from 128 tokens on, multiplies sums of bfloat16
        pieces. For y and dx two pieces of each factor are taken, an error of 2⁻¹⁶ where their own rounding is 2⁻⁹; the ranks and the
        gradients of parameters take all pieces.

    Raises:
        ValueError: a shape, a device or a value does not fit; the message names the argument and what it was.
        TypeError: a dtype is not one of the four, or A, B, A_general and B_general differ in dtype.
    """
    p = dropout_p if training else 0.0
    return add_path(x, base, A, B, A_general, B_general, _seed(x, p), scaling, p)


def add_path(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """:func:`gralora` with the seed of its dropout mask given; None where ``dropout_p`` is 0."""
    if kernels.can_take(x):
        return _gralora(x, base, A, B, A_general, B_general, seed, scaling, dropout_p)[0]
    check_forward(x, base, A, B, A_general, B_general, seed, scaling, dropout_p)
    with kernels.without_autocast(x.device):
        return reference.gralora(
            x, base, A, B, scaling=scaling, A_general=A_general, B_general=B_general, dropout_p=dropout_p, seed=seed
        )


def gralora_(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """:func:`gralora` written into ``base``: ``base[t, j·M/k+o] += s Σ_c U[t,j,c] B[j,c,o] (+ s (x Agᵀ) Bgᵀ)``.

    The same bits as :func:`gralora`, without an allocation of y's size; differentiable in all tensors. Eager mode only.

    Args:
        x, A, B, scaling, A_general, B_general, dropout_p, training: as in :func:`gralora`.
        base: ``[..., M]``, changed; any strides, without overlap in itself or with what is read.

    Returns:
        y ``[..., M]``, a tensor on ``base``'s memory. Use it in place of ``base``, and of any tensor of which ``base`` is a view:
        their values are y's, and their graph is the old one.

    Raises:
        ValueError, TypeError: as :func:`gralora`; ``base`` overlaps itself, or shares memory with x or the adapter.
        RuntimeError: ``base`` is a leaf that requires grad, or a view of one; in backward, another operation has saved ``base``.
    """
    p = dropout_p if training else 0.0
    if kernels.can_take(x):
        return _gralora_(x, base, A, B, A_general, B_general, _seed(x, p), scaling, p)[0]
    return base.copy_(add_path(x, base, A, B, A_general, B_general, _seed(x, p), scaling, p))


def _seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """The seed of a mask for ``x``, drawn with torch's generator; None where nothing is dropped, or ``x`` is no tensor."""
    return draw_seed(x.device) if dropout_p != 0.0 and isinstance(x, Tensor) else None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    own_gemm: bool = True,
) -> Tensor:
    """A frozen linear layer with its adapter, ``y = x (W + ΔW)ᵀ + bias``, as one operation; differentiable in all but the layer.

    The same function as ``gralora(x, F.linear(x, weight, bias), A, B, ...)``, for training and for many tokens. With ``own_gemm``,
    on the CPU alone, it is one product: W + ΔW is made block by block where the product packs its operand anyway, so that the adapter costs 2NMr/k FLOPs
    in forward and again for dx, whatever the tokens, and for backward nothing is kept but x and the parameters. ΔW is that of
    :func:`merge_`.

    Without ``own_gemm`` torch multiplies, ``y = x Wᵀ + bias``, the path of x is added in place, and backward adds the path's dx in
    place to that of the layer: y has the bits of :func:`gralora` on such a base, what is kept is the same, and autograd has no two
    dx to add. With dropout it is the same with either GEMM, since dropout falls on the adapter's x alone.

    Args:
        x: ``[..., N]``, any rank ≥ 1, any strides; with ``own_gemm`` float32 (float64 for checks).
        weight: ``[M, N]``, any strides, in x's dtype; not differentiated.
        bias: ``[M]`` in x's dtype, or None; not differentiated.
        A, B, scaling, A_general, B_general, dropout_p, training: as in :func:`gralora`.
        own_gemm: whether this extension multiplies, on the CPU alone, or torch.

    Returns:
        y ``[..., M]`` in x's dtype.

    Raises:
        ValueError, TypeError: as :func:`gralora`.
        RuntimeError: ``weight`` or ``bias`` requires grad.
    """
    p = dropout_p if training else 0.0
    if kernels.can_take(x):
        return _linear(x, weight, bias, A, B, A_general, B_general, _seed(x, p), scaling, p, own_gemm)[0]
    seed = _seed(x, p)
    check_linear(x, weight, bias, A, B, A_general, B_general, seed, scaling, p, own_gemm)
    with kernels.without_autocast(x.device):
        base = functional.linear(x, weight, bias)
    return add_path(x, base, A, B, A_general, B_general, seed, scaling, p)


def merge_(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """Adds the adapter to ``weight`` in place, reading and writing each weight once.

    ``W[j·M/k+o, n·N/k+i] += s Σ_q A[n,i,j·rb+q] B[j,n·rb+q,o] (+ s Bg Ag)``; not differentiable.

    Args:
        weight: ``[M, N]`` (``[N, M]`` with ``fan_in_fan_out``), any strides without overlap, any of the four dtypes.
        A, B, scaling, A_general, B_general: as in :func:`gralora`. A negative ``scaling`` unmerges.
        fan_in_fan_out: the weight is stored transposed, as in transformers' ``Conv1D``.

    Returns:
        ``weight``, the same tensor.

    Raises:
        ValueError, TypeError: as :func:`gralora`; ``weight`` overlaps itself, or shares memory with the adapter.
    """
    with torch.no_grad():
        if kernels.can_take(weight):
            _merge_(weight, A, B, A_general, B_general, scaling, fan_in_fan_out)
            return weight
    check_merge(weight, A, B, A_general, B_general, scaling, fan_in_fan_out)
    return reference.merge_(
        weight, A, B, scaling=scaling, A_general=A_general, B_general=B_general, fan_in_fan_out=fan_in_fan_out
    )


def delta_weight(
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """The weight that :func:`merge_` would add, as a new tensor in A's dtype: ``[M, N]``, or ``[N, M]`` with
    ``fan_in_fan_out``. Not differentiable.

    Args, raises: as :func:`merge_`.
    """
    with torch.no_grad():
        if kernels.can_take(A):
            return _delta_weight(A, B, A_general, B_general, scaling, fan_in_fan_out)
        check_adapter(A, B, A_general, B_general, scaling)
        return reference.delta_weight(
            A, B, scaling=scaling, A_general=A_general, B_general=B_general, fan_in_fan_out=fan_in_fan_out
        )
