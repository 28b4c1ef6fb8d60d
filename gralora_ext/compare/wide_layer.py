# SPDX-License-Identifier: Apache-2.0
"""One wide layer trained alone: a small model's layers do not hold the ranks of the paper's setting."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..ops import gralora
from ..reference import delta_weight
from .extras import rank_of
from .plan import digest_of

WIDTH, TOKENS, STEPS, RATE = 1152, 512, 20, 1e-3  # N = M; k·r = 1,024 fits in


def digest(k: int, r: int, seed: int) -> str:
    """Of all that decides what :func:`trained` finds."""
    return digest_of([k, r, seed, WIDTH, TOKENS, STEPS, RATE])


def trained(k: int, r: int, seed: int, threads: int | None = None) -> dict[str, Any]:
    """Ranks of ΔW after training toward the outputs of a random matrix, in float32, with AdamW.

    The loss is ‖y - x W*ᵀ‖² over its size, of new random rows ``x`` in each step; A begins as in PEFT, B with zeros.
    ``threads``: as torch chooses, where it is None.
    """
    if threads:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    bound = (WIDTH / k) ** -0.5
    A = (torch.rand(k, WIDTH // k, r, generator=generator) * 2 - 1).mul_(bound).requires_grad_()
    B = torch.zeros(k, r, WIDTH // k).requires_grad_()
    optimizer = torch.optim.AdamW([A, B], lr=RATE, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(TOKENS, WIDTH, generator=generator)
        y = gralora(x, torch.zeros(TOKENS, WIDTH), A, B, scaling=2.0)
        loss = (y - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    delta = delta_weight(A.detach().double(), B.detach().double(), scaling=2.0)
    found = {"most": min(k * r, WIDTH), **rank_of(delta)}
    return {"ranks": found, "losses": losses, "seconds": time.perf_counter() - started}
