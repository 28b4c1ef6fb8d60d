# SPDX-License-Identifier: Apache-2.0
"""GraLoRA's ΔW as LoRA's product: exactly, with rank k·r + h, or as near to it as a smaller rank comes.

    ΔW = s · lora_B · lora_A        lora_A [R, N], lora_B [M, R]

The rank index of the exact form is (n, j, q), then the h ranks of the hybrid part. A row (n, j, q) of lora_A is zero outside input
block n, a column of lora_B outside output block j.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The two factors of a LoRA."""

    lora_A: Tensor  # [R, N]
    lora_B: Tensor  # [M, R]


def exact_rank(A: Tensor, B: Tensor, A_general: Tensor | None = None, B_general: Tensor | None = None) -> int:
    """The rank of the exact form, k·r + h. Args: as of :func:`exact`."""
    return A.shape[0] * A.shape[2] + (0 if A_general is None else A_general.shape[0])


def exact(A: Tensor, B: Tensor, A_general: Tensor | None = None, B_general: Tensor | None = None) -> Factors:
    """The factors with ``ΔW / s = lora_B · lora_A``, whose elements are zeros and those of the adapter, bit for bit.

    Args:
        A: ``[k, N/k, r]``.
        B: ``[k, r, M/k]``.
        A_general: ``[h, N]``, of the hybrid part, or None.
        B_general: ``[M, h]``, of the hybrid part, or None.
    """
    k, inputs, r = A.shape
    outputs, ranks, all_ranks = B.shape[2], k * r, exact_rank(A, B, A_general, B_general)
    lora_A, lora_B = A.new_zeros(all_ranks, k * inputs), B.new_zeros(k * outputs, all_ranks)
    blocks_A = lora_A[:ranks].view(k, r, k, inputs)  # [n of the rank, j·rb + q, n of the input, i]
    blocks_A.diagonal(dim1=0, dim2=2).copy_(A.permute(2, 1, 0))
    blocks_B = lora_B.view(k, outputs, all_ranks)[..., :ranks].unflatten(2, (k, k, -1))  # [j of the output, o, n, j, q]
    blocks_B.diagonal(dim1=0, dim2=3).copy_(B.unflatten(1, (k, -1)).permute(3, 1, 2, 0))
    if A_general is not None and B_general is not None:
        lora_A[ranks:] = A_general
        lora_B[:, ranks:] = B_general
    return Factors(lora_A, lora_B)


class Decomposition(NamedTuple):
    """The singular value decomposition of ΔW / s in float64, with its large factors kept apart by block.

    ``ΔW / s = diag(left) · U · diag(S) · Vh · diag(right)ᵀ``, where ``diag`` puts the k blocks on a diagonal.
    """

    left: Tensor  # [k, M/k, p], orthonormal columns
    U: Tensor  # [k·p, c]
    S: Tensor  # [c], falling
    Vh: Tensor  # [c, k·p']
    right: Tensor  # [k, N/k, p'], orthonormal columns

    def factors(self, rank: int) -> Factors:
        """The nearest factors of that rank: the rows of lora_A are orthonormal, and lora_B has the singular values.

        Ranks behind those that ΔW has are zeros.
        """
        k, kept = self.left.shape[0], min(rank, len(self.S))
        scaled = (self.U[:, :kept] * self.S[:kept]).unflatten(0, (k, -1))
        lora_B = torch.bmm(self.left, scaled).flatten(0, 1)
        rows = self.Vh[:kept].unflatten(1, (k, -1)).transpose(0, 1)  # [n, kept, p']
        lora_A = torch.bmm(rows, self.right.mT).transpose(0, 1).flatten(1)
        return padded(Factors(lora_A, lora_B), rank)

    def error(self, rank: int) -> float:
        """``‖ΔW - nearest of that rank‖ / ‖ΔW‖`` in Frobenius' norm; 0 where ΔW is zero."""
        energy = self.S.square()
        total = energy.sum()
        return 0.0 if total == 0 else float((energy[rank:].sum() / total).sqrt())


def decompose(A: Tensor, B: Tensor, A_general: Tensor | None = None, B_general: Tensor | None = None) -> Decomposition:
    """The decomposition of ΔW / s out of small ones; ΔW itself is never made.

    B of each output block, beside its rows of B_general, is Q·R with Q ``[M/k, p]``, p at most r + h; A of each input block likewise.
    What is left to decompose is the k·p x k·p' matrix of the products of the R.

    Args: as of :func:`exact`.

    Raises:
        ValueError: an element is not finite.
    """
    tensors = [t for t in (A, B, A_general, B_general) if t is not None]
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise ValueError("the adapter holds NaN or infinity, of which there is no singular value decomposition")
    k, r = A.shape[0], A.shape[2]
    outputs, inputs = B.mT.double(), A.double()  # [j, M/k, (n, q)], [n, N/k, (j, q)]
    if A_general is not None and B_general is not None:
        outputs = torch.cat([outputs, B_general.double().unflatten(0, (k, -1))], dim=2)
        inputs = torch.cat([inputs, A_general.double().mT.unflatten(0, (k, -1))], dim=2)
    left, R_B = torch.linalg.qr(outputs)
    right, R_A = torch.linalg.qr(inputs)
    of_blocks = R_B[..., :r].unflatten(2, (k, -1)), R_A[..., :r].unflatten(2, (k, -1))
    core = torch.einsum("jpnq,ncjq->jpnc", *of_blocks) + torch.einsum("jph,nch->jpnc", R_B[..., r:], R_A[..., r:])
    U, S, Vh = torch.linalg.svd(core.flatten(2, 3).flatten(0, 1), full_matrices=False)
    return Decomposition(left, U, S, Vh, right)


def padded(factors: Factors, rank: int) -> Factors:
    """The same product, with zeros behind the ranks, so that there are ``rank`` of them."""
    more = rank - factors.lora_A.shape[0]
    lora_A = torch.nn.functional.pad(factors.lora_A, (0, 0, 0, more))
    return Factors(lora_A, torch.nn.functional.pad(factors.lora_B, (0, more)))


def scaled(factors: Factors, scaling: float, dtype: torch.dtype) -> Factors:
    """The scaling multiplied into lora_B, and both in ``dtype``, rounded once."""
    wide = torch.promote_types(factors.lora_B.dtype, torch.float32)
    return Factors(factors.lora_A.to(dtype), (factors.lora_B.to(wide) * scaling).to(dtype))
