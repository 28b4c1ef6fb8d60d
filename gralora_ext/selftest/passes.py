# SPDX-License-Identifier: Apache-2.0
"""Forward, backward and merge of the operations against the reference in float64, on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels, ops, reference
from ..tolerances import tolerance
from ..tuner.exact import Kept, Operands

P_DROPOUT = 0.25
# Each element of a large result has so many times the bound of results of few elements: what is
# rounded on the way may be some times as large as the element.
ELEMENT = 4.0
# Tokens of a frozen layer in bfloat16 where torch multiplies by plain loops: more take minutes.
TOKENS_BY_LOOPS = 16


@dataclass(frozen=True)
class Case:
    """T tokens of N features into M, on a grid of k, with rank r and a hybrid part of rank h."""

    T: int
    N: int
    M: int
    k: int
    r: int
    h: int
    activations: torch.dtype
    adapter: torch.dtype
    dropout: bool = False
    outputs: torch.dtype | None = None  # of base and y; None: as activations

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.activations, self.adapter, *([] if self.outputs is None else [self.outputs]))

    def __str__(self) -> str:
        dtypes = "+".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        hybrid, dropout = f" h={self.h}" if self.h else "", " with dropout" if self.dropout else ""
        return f"T={self.T} {self.N}x{self.M} r={self.r} k={self.k}{hybrid} {dtypes}{dropout}"


def cases() -> list[Case]:
    """Odd and even sizes of every pair of dtypes that has kernels of its own, mixed ones, what autocast makes, layers of real
    models, and tokens so few or layers so narrow that threads share the work in each way that there is."""
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    found = []
    for pair in ((f32, f32), (bf16, f32), (bf16, bf16), (f16, f32), (f16, f16), (f64, f64), (bf16, f16)):
        found += [Case(257, 576, 1536, 2, 16, 0, *pair), Case(131, 222, 390, 3, 12, 5, *pair, dropout=True)]
    found += [Case(1, 2048, 2048, 2, 32, 0, bf16, f32), Case(2048, 2048, 5632, 4, 64, 0, bf16, f32, dropout=True)]
    for x, base in ((f32, bf16), (f32, f16), (bf16, f32)):
        found += [Case(131, 222, 390, 3, 12, 5, x, f32, dropout=True, outputs=base)]
    for T, width, k, r in (
        (1, 2048, 2, 32),
        (64, 2048, 2, 16),
        (5, 2048, 1, 64),
        (5, 2048, 4, 64),
        (5, 2048, 8, 64),
        (5, 64, 1, 8),
    ):
        found.append(Case(T, width, width, k, r, 0, f32, f32))
    return found


def check(case: Case, device: torch.device) -> Iterator[tuple[str, float]]:
    """What was computed, and its error as a share of what is allowed."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    n, m = case.N // case.k, case.M // case.k
    dtypes, outputs = case.dtypes, case.outputs or case.activations
    x, base = values(case.T, case.N, dtype=case.activations), values(case.T, case.M, dtype=outputs)
    grad = values(case.T, case.M, dtype=outputs)
    adapter: dict[str, Any] = {
        "A": values(case.k, n, case.r, dtype=case.adapter, scale=n**-0.5),
        "B": values(case.k, case.r, m, dtype=case.adapter, scale=case.r**-0.5),
    }
    if case.h:
        adapter["A_general"] = values(case.h, case.N, dtype=case.adapter, scale=case.N**-0.5)
        adapter["B_general"] = values(case.M, case.h, dtype=case.adapter, scale=case.h**-0.5)

    with torch.enable_grad():
        leaves: dict[str, Any] = {name: t.requires_grad_() for name, t in {"x": x, "base": base, **adapter}.items()}
        torch.manual_seed(1)
        y = ops.gralora(**leaves, scaling=0.75, dropout_p=P_DROPOUT if case.dropout else 0.0)
        gradients = torch.autograd.grad(y, list(leaves.values()), grad)
        torch.manual_seed(1)
        wide: dict[str, Any] = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
        expected = reference.gralora(
            **wide, scaling=0.75, dropout_p=P_DROPOUT if case.dropout else 0.0, seed=reference.draw_seed(device)
        )
        wanted = torch.autograd.grad(expected, list(wide.values()), grad.double())
    yield f"forward {case}", _share(y, expected, dtypes)
    for name, actual, right in zip(leaves, gradients, wanted, strict=True):
        yield f"gradient of {name}, {case}", _share(actual, right, dtypes, gradient=True)

    if case.outputs is None:
        by_loops = device.type == "cpu" and case.activations == torch.bfloat16 and kernels.torch_has_bf16_loops()
        tokens = slice(TOKENS_BY_LOOPS if by_loops else None)
        weight = values(case.M, case.N, dtype=case.activations, scale=case.N**-0.5)
        may_be_own = device.type == "cpu" and case.activations in (torch.float32, torch.float64)
        for own_gemm in (True, False) if may_be_own else (False,):
            for p in (0.0, P_DROPOUT) if case.dropout else (0.0,):
                yield from _check_layer(case, own_gemm, p, x.detach()[tokens], grad[tokens], weight, adapter)

    with torch.no_grad():
        weight = values(case.M, case.N, dtype=case.activations)
        merged = ops.merge_(weight.clone(), **adapter, scaling=0.75)
        wide_adapter: dict[str, Any] = {name: t.double() for name, t in adapter.items()}
        expected = reference.merge_(weight.double().clone(), **wide_adapter, scaling=0.75)
        yield f"merge {case}", _share(merged, expected)
        delta = reference.delta_weight(**wide_adapter, scaling=0.75)
        yield f"dW {case}", _share(ops.delta_weight(**adapter, scaling=0.75), delta)
        if device.type == "cpu":
            yield from _check_codes(case, weight, expected, adapter)


def _check_codes(case: Case, weight: Tensor, expected: Tensor, adapter: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The layers' own merge, which keeps codes and is taken off to the bits of before."""
    operands = Operands("", adapter["A"], adapter["B"], adapter.get("A_general"), adapter.get("B_general"), 0.75)
    kept, coded = Kept(weight, [operands], False), weight.clone()
    kept.merge(coded, coded)
    yield f"merge with codes {case}", _share(coded, expected)
    kept.take_off(coded)
    yield f"unmerge by codes {case}", 0.0 if coded.equal(weight) else math.inf


def _check_layer(
    case: Case, own_gemm: bool, dropout_p: float, x: Tensor, grad: Tensor, weight: Tensor, adapter: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    """The frozen layer with its adapter: one product, or with dropout and by torch's GEMM its own and the path."""
    dtypes = (case.activations, case.adapter)
    with torch.enable_grad():
        leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in {"x": x, **adapter}.items()}
        torch.manual_seed(1)
        y = ops.linear(weight=weight, bias=None, **leaves, scaling=0.75, dropout_p=dropout_p, own_gemm=own_gemm)
        gradients = torch.autograd.grad(y, list(leaves.values()), grad)
        torch.manual_seed(1)
        wide: dict[str, Any] = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
        base = torch.nn.functional.linear(wide["x"], weight.double())
        seed = reference.draw_seed(x.device)
        expected = reference.gralora(base=base, **wide, scaling=0.75, dropout_p=dropout_p, seed=seed)
        wanted = torch.autograd.grad(expected, list(wide.values()), grad.double())
    layer = "frozen layer by torch's GEMM" if not own_gemm else "frozen layer" if dropout_p else "one product"
    yield f"{layer} {case}", _share(y, expected, dtypes)
    for name, actual, right in zip(leaves, gradients, wanted, strict=True):
        yield f"gradient of {name} of {layer}, {case}", _share(actual, right, dtypes, gradient=True)


def _share(actual: Tensor, expected: Tensor, inputs: tuple[torch.dtype, ...] = (), gradient: bool = False) -> float:
    """The error as a share of what is allowed, in norm and of the worst element: a wrong one alone is not in the norm."""
    error, size = (actual.detach().double() - expected).abs(), expected.norm()
    in_norm = (error.norm() / size).item() / tolerance(actual, inputs, gradient)
    rms = size / math.sqrt(expected.numel())
    of_one = (error / (expected.abs() + rms)).max().item() / (
        ELEMENT * tolerance(actual.flatten()[:1], inputs, gradient)
    )
    share = max(in_norm, of_one)
    return math.inf if math.isnan(in_norm + of_one) else share
