# SPDX-License-Identifier: Apache-2.0
"""Adapters of one layer made into one: the arithmetic of :meth:`gralora_ext.GraloraModel.add_weighted_adapter`.

What comes out has the scaling 1: ΔW is the product of its A and B.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.utils import merge_utils
from torch import Tensor

from .. import ops
from . import blocks

TASK_ARITHMETIC = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
BY_SVD = ("svd", "ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd")


class Weights(NamedTuple):
    """The tensors of an adapter; the general ones are None where there is no hybrid part."""

    A: Tensor  # [k, N/k, r]
    B: Tensor  # [k, r, M/k]
    A_general: Tensor | None  # [h, N]
    B_general: Tensor | None  # [M, h]


class Term(NamedTuple):
    """An adapter of the layer, its scaling, and the weight it is given in the sum."""

    tensors: Weights
    scaling: float
    weight: float


class Svd(NamedTuple):
    """How blocks are decomposed: LoRA's arguments of the same names."""

    clamp: float | None
    full_matrices: bool
    driver: str | None


def concatenated(terms: list[Term], r: int, h: int) -> Weights:
    """``ΔW = Σ weight_i ΔW_i``, exactly.

    The ranks of each block, and of the hybrid part, one adapter after the other, then zeros up to r and h.
    """
    factors = [term.weight * term.scaling for term in terms]
    A = torch.cat([blocks.split_A(t.tensors.A) * f for t, f in zip(terms, factors, strict=True)], dim=3)
    B = torch.cat([blocks.split_B(t.tensors.B) for t in terms], dim=2)
    A, B = blocks.padded_A(A.flatten(2, 3), r), blocks.padded_B(B.flatten(1, 2), r)
    if h == 0:
        return Weights(A, B, None, None)
    A_general, B_general = A.new_zeros(h, A.shape[0] * A.shape[1]), B.new_zeros(B.shape[0] * B.shape[2], h)
    start = 0
    for term, factor in zip(terms, factors, strict=True):
        first, second = term.tensors.A_general, term.tensors.B_general
        if first is not None and second is not None:
            end = start + first.shape[0]
            A_general[start:end], B_general[:, start:end], start = first * factor, second, end
    return Weights(A, B, A_general, B_general)


def merge_function(kind: str, density: float | None, majority_sign_method: Any) -> Callable[..., Tensor]:
    """PEFT's function of (tensors, weights) for a type of combination, with or without ``_svd``."""
    name = kind.removesuffix("_svd")
    if name in ("linear", "svd"):
        return merge_utils.task_arithmetic
    merge = getattr(merge_utils, name)
    more = {"majority_sign_method": majority_sign_method} if name.endswith("ties") else {}
    return lambda tensors, weights: merge(tensors, weights, density=density, **more)


def task_arithmetic(terms: list[Term], merge: Callable[..., Tensor]) -> Weights:
    """A of the A's and B of the B's, each tensor by itself, as LoRA does it.

    Either is weighted by the root of ``|weight · scaling|``, and A by its sign too.
    """
    factors = [term.weight * term.scaling for term in terms]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    merged = []
    for tensors, weights in zip(zip(*(term.tensors for term in terms), strict=True), (signed, roots) * 2, strict=True):
        merged.append(None if tensors[0] is None else _merged(list(tensors), weights, merge))
    return Weights(*merged)  # type: ignore[arg-type]  # A and B are there


def decomposed(terms: list[Term], r: int, merge: Callable[..., Tensor], svd: Svd) -> Weights:
    """The adapter of rank r without a hybrid part that is nearest to the merged ΔW.

    It keeps of each block the r/k largest singular values.
    """
    A, B = terms[0].tensors.A, terms[0].tensors.B
    k, dtype = A.shape[0], torch.promote_types(A.dtype, torch.float32)
    delta = _merged([_delta(term, dtype) for term in terms], [term.weight for term in terms], merge)
    by_block = delta.unflatten(1, (k, -1)).unflatten(0, (k, -1)).transpose(1, 2)  # [j, n, M/k, N/k]
    U, S, Vh = torch.linalg.svd(by_block, full_matrices=svd.full_matrices, driver=svd.driver)
    kept = min(r // k, S.shape[-1])
    U, Vh = U[..., :kept] * S[..., None, :kept], Vh[..., :kept, :]
    if svd.clamp is not None:
        high = torch.quantile(torch.cat([U.flatten(), Vh.flatten()]), svd.clamp)
        U, Vh = U.clamp(-high, high), Vh.clamp(-high, high)
    new_A = Vh.permute(1, 3, 0, 2).flatten(2, 3)  # [n, N/k, j·kept + q]
    new_B = U.permute(0, 1, 3, 2).flatten(1, 2)  # [j, n·kept + q, M/k]
    return Weights(blocks.padded_A(new_A, r).to(A.dtype), blocks.padded_B(new_B, r).to(B.dtype), None, None)


def _merged(tensors: list[Tensor], weights: list[float], merge: Callable[..., Tensor]) -> Tensor:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return merge(tensors, torch.tensor(weights, dtype=dtype, device=tensors[0].device)).to(tensors[0].dtype)


def _delta(term: Term, dtype: torch.dtype) -> Tensor:
    """ΔW of a term as ``[M, N]``."""
    A, B = term.tensors.A.to(dtype), term.tensors.B.to(dtype)
    A_general, B_general = (None if t is None else t.to(dtype) for t in term.tensors[2:])
    return ops.delta_weight(A, B, scaling=term.scaling, A_general=A_general, B_general=B_general)
