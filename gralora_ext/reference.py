# SPDX-License-Identifier: Apache-2.0
"""GraLoRA in plain torch: the specification that every kernel is compared with.

Letters: T tokens, N in_features, M out_features, k the grid, r the rank, rb = r/k, h the rank of the plain LoRA beside
it, s the scaling. All functions compute in the widest dtype of their inputs, at least float32, and round once at the end.
Source of the method: GraLoRA, arXiv 2505.20355.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _mulhilo(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``m * x`` for 32-bit values held in int64 (the product is split so as not to overflow)."""
    low, high = m * (x & 0xFFFF), m * (x >> 16)
    mid = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (mid >> 16), ((mid & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_4x32_10(seed: int | Tensor, counter: Tensor) -> Tensor:
    """Philox-4x32-10 (Salmon et al., SC 2011) of ``counter [n]`` (int64, ≥ 0) under the 64-bit key ``seed``.

    ``seed`` may be one int64 element on ``counter``'s device, which is then not waited for. Returns ``[n, 4]`` 32-bit values held in int64. The upper two counter words are zero.
    """
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    c0, c1 = counter & _LOW32, (counter >> 32) & _LOW32
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(10):
        hi0, lo0 = _mulhilo(_PHILOX_M[0], c0)
        hi1, lo1 = _mulhilo(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W[0]) & _LOW32, (k1 + _PHILOX_W[1]) & _LOW32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def dropout_draws(seed: int | Tensor, counter: Tensor) -> Tensor:
    """The draws of 16 bits, under the 64-bit key ``seed``, of elements ``16 c .. 16 c + 15`` for each c of ``counter [n]``.

    Returns ``[16 n]`` values in [0, 2¹⁶), held in int64. With b the 16 bytes of :func:`philox_4x32_10`, those of a word
    counted from its low one, draw i has the high byte b[i] and, for the one of 256 elements that this does not decide, the
    low byte b[i ± 8] ^ b[i + 1], where i + 1 stays in its half of b. So any two draws are independent.
    """
    words = philox_4x32_10(seed, counter)
    halves = torch.stack([words >> bits & 0xFF for bits in (0, 8, 16, 24)], dim=-1).unflatten(1, (2, 2)).flatten(2)
    return (halves << 8 | halves.flip(1) ^ halves.roll(-1, dims=2)).flatten()


def dropout_mask(seed: Tensor, shape: tuple[int, ...] | torch.Size, dropout_p: float) -> Tensor:
    """The keep mask of ``x`` (bool, ``shape``): an element is kept where its draw is ≥ round(p · 2¹⁶).

    Draws are those of the element's row-major index under the key ``seed`` (one int64 element); p counts in steps of 2⁻¹⁶.
    """
    n = math.prod(shape)
    draws = dropout_draws(seed, torch.arange((n + 15) // 16, dtype=torch.int64, device=seed.device))
    return (draws[:n] >= round(dropout_p * 2**16)).reshape(shape)


def drop(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """x after inverted dropout: elements that :func:`dropout_mask` keeps are divided by 1 - p, the others are zeros."""
    return torch.where(dropout_mask(seed, x.shape, dropout_p), x / (1.0 - dropout_p), 0.0)


def draw_seed(device: torch.device | str) -> Tensor:
    """A one-element int64 tensor on ``device``, drawn with torch's own generator (so ``manual_seed`` fixes the mask)."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def exchange(H: Tensor) -> Tensor:
    """The block exchange: ``U[..., j, n·rb + q] = H[..., n, j·rb + q]`` for ``H [..., k, r]``; it is its own inverse."""
    k, r = H.shape[-2:]
    return H.unflatten(-1, (k, r // k)).transpose(-3, -2).flatten(-2)


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
    seed: Tensor | None = None,
) -> Tensor:
    """Adds the GraLoRA path of ``x`` to ``base``: ``y = base + s·exchange(x_n A_n) B_j (+ s·(x Agᵀ) Bgᵀ)``.

    Shapes: ``x [..., N]``, ``base [..., M]``, ``A [k, N/k, r]``, ``B [k, r, M/k]``, ``A_general [h, N]``,
    ``B_general [M, h]``; returns ``[..., M]`` in ``base``'s dtype. ``seed`` is drawn where dropout is on and none is given.
    """
    k = A.shape[0]
    dtype = _compute_dtype(x, base, A, B, A_general, B_general)
    xd = x.to(dtype)
    if training and dropout_p > 0.0:
        xd = drop(xd, draw_seed(x.device) if seed is None else seed, dropout_p)
    H = torch.einsum("...ni,nic->...nc", xd.unflatten(-1, (k, A.shape[1])), A.to(dtype))
    update = torch.einsum("...jc,jco->...jo", exchange(H), B.to(dtype)).flatten(-2)
    if A_general is not None and B_general is not None:
        update = update + (xd @ A_general.to(dtype).T) @ B_general.to(dtype).T
    return (base.to(dtype) + scaling * update).to(base.dtype)


def delta_weight(
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """``dW[j·M/k + o, n·N/k + i] = s·Σ_q A[n, i, j·rb + q] · B[j, n·rb + q, o] (+ s·Bg Ag)`` in ``A``'s dtype.

    Returns ``[M, N]``, or its transpose ``[N, M]`` with ``fan_in_fan_out``.
    """
    k, _, r = A.shape
    dtype = _compute_dtype(A, B, A_general, B_general)
    Aq = A.to(dtype).unflatten(2, (k, r // k))  # [n, i, j, q]
    Bq = B.to(dtype).unflatten(1, (k, r // k))  # [j, n, q, o]
    dW = torch.einsum("nijq,jnqo->joni", Aq, Bq).flatten(2).flatten(0, 1)
    if A_general is not None and B_general is not None:
        dW = dW + B_general.to(dtype) @ A_general.to(dtype)
    dW = scaling * dW
    return (dW.T if fan_in_fan_out else dW).contiguous().to(A.dtype)


@torch.no_grad()
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
    """Adds :func:`delta_weight` to ``weight [M, N]`` (``[N, M]`` with ``fan_in_fan_out``) in place, rounding once."""
    dtype = _compute_dtype(weight, A, B, A_general, B_general)
    general = {"A_general": A_general, "B_general": B_general}
    wide = {name: t.to(dtype) for name, t in general.items() if t is not None}
    dW = delta_weight(A.to(dtype), B.to(dtype), scaling=scaling, fan_in_fan_out=fan_in_fan_out, **wide)
    return weight.copy_((weight.to(dtype) + dW).to(weight.dtype))
