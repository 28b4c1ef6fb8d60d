# SPDX-License-Identifier: Apache-2.0
"""What the tests of ``ops.linear`` share: a frozen layer with its adapter, and what it must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from helpers import Case, Inputs, assert_results_near, cases, make, value_and_gradients
from hypothesis import strategies as st
from torch import Tensor

from gralora_ext import ops, reference

native = torch.ops.gralora_ext
FP32 = Case(leading=(70,), k=2, n=48, m=40, rb=4)


def layer_inputs(
    case: Case, weight_layout: str = "contiguous", bias: bool = True, bias_layout: str = "contiguous"
) -> Inputs:
    """As ``case.inputs()``, with a weight (and a bias) of the layer in place of base."""
    case = replace(case, base_dtype=case.x_dtype)
    inputs = case.inputs()
    generator = torch.Generator().manual_seed(case.seed + 1)
    N, M = case.k * case.n, case.k * case.m
    del inputs.tensors["base"]
    inputs.tensors["weight"] = make((M, N), weight_layout, case.x_dtype, generator, N**-0.5)
    if bias:
        inputs.tensors["bias"] = make((1, M), bias_layout, case.x_dtype, generator)[0]
    return inputs


def expected_layer(x: Tensor, weight: Tensor, bias: Tensor | None = None, **others: Any) -> Tensor:
    return reference.gralora(x, torch.nn.functional.linear(x, weight, bias), **others)


def results(inputs: Inputs, layer: Callable[..., Tensor] = ops.linear) -> dict[str, Tensor]:
    """y and the gradients of all that has one."""
    frozen = {name: inputs.tensors.get(name) for name in ("weight", "bias")}
    trained = {name: t for name, t in inputs.tensors.items() if name not in frozen}

    def op(x: Tensor, **others: Any) -> Tensor:
        return layer(x, **frozen, **others)

    return value_and_gradients(op, Inputs(trained, inputs.grad, inputs.scaling))


def assert_layer_near(inputs: Inputs, layer: Callable[..., Tensor] = ops.linear) -> None:
    assert_results_near(results(inputs, layer), inputs, expected_layer, like_y="x")


def layer_cases() -> st.SearchStrategy[Case]:
    """Those whose activations are float32; where the adapter is float64, all are."""
    return cases().map(
        lambda c: replace(c, x_dtype=c.adapter_dtype if c.adapter_dtype == torch.float64 else torch.float32)
    )


def kept_for_backward(inputs: Inputs, layer: Callable[..., Tensor]) -> list[Tensor]:
    """What autograd saves, but for empty tensors; all but the layer's own require a gradient."""
    for name in inputs.tensors.keys() - {"weight", "bias"}:
        inputs.tensors[name].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(**inputs.tensors, scaling=1.0)
    return [t for t in kept if t.numel()]
