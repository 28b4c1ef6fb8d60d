# SPDX-License-Identifier: Apache-2.0
"""How A and B begin, where PEFT's GraLoRA has no such way."""

from __future__ import annotations

import math

import torch
from peft.tuners.gralora.layer import GraloraLayer
from torch import Tensor


def finish(layer: GraloraLayer, adapter: str, config: object) -> None:
    """What the configuration asks for beyond what PEFT has done with the adapter: its scaling and how it begins."""
    layer.use_rslora = {**getattr(layer, "use_rslora", {}), adapter: getattr(config, "use_rslora", False)}
    if layer.use_rslora[adapter]:
        layer.scaling[adapter] = scaling(layer, adapter)
    how = getattr(config, "init_weights", True)
    if isinstance(how, str):
        begin = {"gaussian": _gaussian, "orthogonal": _orthogonal}[how]
        with torch.no_grad():
            begin(layer, adapter)


def scaling(layer: GraloraLayer, adapter: str) -> float:
    """alpha/(r + h), or alpha/√(r + h), of an adapter, whatever its scaling has been set to since."""
    uses_root = getattr(layer, "use_rslora", {}).get(adapter, False)  # PEFT's own layer does not have it
    return scaling_for(layer.alpha[adapter], layer.r[adapter] + layer.hybrid_r[adapter], uses_root)


def scaling_for(alpha: float, ranks: int, use_rslora: bool) -> float:
    """alpha/ranks, or with ``use_rslora`` alpha/√ranks."""
    return alpha / math.sqrt(ranks) if use_rslora else alpha / ranks


def _gaussian(layer: GraloraLayer, adapter: str) -> None:
    _draw(layer.gralora_A[adapter], std=1 / layer.r[adapter])
    if layer.hybrid_r[adapter] > 0:
        _draw(layer.gralora_A_general[adapter].weight, std=1 / layer.hybrid_r[adapter])


def _draw(tensor: Tensor, std: float) -> None:
    """In float32, since torch draws none in float8, in which PEFT puts an adapter beside such a base."""
    tensor.copy_(torch.empty_like(tensor, dtype=torch.float32).normal_(std=std))


def _orthogonal(layer: GraloraLayer, adapter: str) -> None:
    """As LoRA's, for each block (n, j) of its own, and for the hybrid part: A and B are random and their product is zero."""
    A, B = layer.gralora_A[adapter], layer.gralora_B[adapter]
    k, h = layer.gralora_k[adapter], layer.hybrid_r[adapter]
    rb = layer.r[adapter] // k
    for name, rank in (("r / gralora_k", rb), ("hybrid_r", h)):
        if rank % 2 != 0:
            raise ValueError(f"init_weights='orthogonal' needs an even {name}, got {rank}")
    for n in range(k):
        for j in range(k):
            first, second = _orthogonal_pair(rb, A.shape[1], B.shape[2], A)
            A[n, :, j * rb : (j + 1) * rb] = first
            B[j, n * rb : (n + 1) * rb] = second
    if h > 0:
        first, second = _orthogonal_pair(h, layer.in_features, layer.out_features, A)
        layer.gralora_A_general[adapter].weight.copy_(first.T)
        layer.gralora_B_general[adapter].weight.copy_(second.T)


def _orthogonal_pair(rank: int, inputs: int, outputs: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """``[inputs, rank]`` and ``[rank, outputs]`` whose product is zero: their ranks lie in orthogonal halves of a space.

    Source: PEFT's LoRA, https://datta0.github.io/posts/rethink-lora-init/
    """
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    odd, even = q[0::2], q[1::2]
    first = torch.randn(inputs, rank // 2) @ odd / 10.0
    second = even.T @ torch.randn(rank // 2, outputs) / 10.0
    return first.to(like), second.to(like)
