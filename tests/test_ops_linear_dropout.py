# SPDX-License-Identifier: Apache-2.0
"""``ops.linear`` with dropout, which falls on x before the adapter alone: the layer's product, and then the path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Case, assert_results_near, cases, same_bits, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_helpers import FP32, expected_layer, layer_cases, layer_inputs, native, results
from torch import Tensor

from gralora_ext import ops

pytestmark = pytest.mark.skipif("config.getoption('device') != 'cpu'", reason="this operation is for the CPU")


def dropped(seed: int, dropout_p: float, own_gemm: bool = True) -> Any:
    """The op with a given seed, as ``results`` wants it."""

    def op(x: Tensor, weight: Tensor, bias: Tensor | None, *, scaling: float, A: Tensor, B: Tensor, **general: Tensor):
        both = (general.get("A_general"), general.get("B_general"))
        return native.linear(x, weight, bias, A, B, *both, torch.tensor([seed]), scaling, dropout_p, own_gemm)[0]

    return op


@given(case=layer_cases(), seed=st.integers(-(2**63), 2**63 - 1), dropout_p=st.sampled_from([0.05, 0.1, 0.5, 0.8]))
@settings(max_examples=150)
def test_the_layer_with_dropout_is_the_references_in_random_cases(case: Case, seed: int, dropout_p: float) -> None:
    inputs = layer_inputs(case)
    got = results(inputs, dropped(seed, dropout_p))
    assert_results_near(got, inputs, expected_layer, like_y="x", dropout_p=dropout_p, seed=torch.tensor([seed]))


@given(case=cases(), seed=st.integers(-(2**63), 2**63 - 1), dropout_p=st.sampled_from([0.05, 0.5]))
@settings(max_examples=100)
def test_with_dropout_by_torchs_gemm_the_layer_is_the_references_in_random_cases(
    case: Case, seed: int, dropout_p: float
) -> None:
    inputs = layer_inputs(case)
    got = results(inputs, dropped(seed, dropout_p, own_gemm=False))
    assert_results_near(got, inputs, expected_layer, like_y="x", dropout_p=dropout_p, seed=torch.tensor([seed]))


@pytest.mark.parametrize(("n", "m"), [(288, 96), (37, 700)])
@pytest.mark.parametrize("T", [1, 3, 97, 770])
@pytest.mark.parametrize("h", [0, 5])
def test_with_dropout_results_do_not_depend_on_the_number_of_threads(h: int, T: int, n: int, m: int) -> None:
    inputs, op = layer_inputs(Case((T,), 2, n, m, 8, h)), dropped(5, 0.3)
    with threads(1):
        one = results(inputs, op)
    assert_results_near(one, inputs, expected_layer, like_y="x", dropout_p=0.3, seed=torch.tensor([5]))
    for count in (2, 3, 8):
        with threads(count):
            many = results(inputs, op)
        assert all(same_bits(many[name], one[name]) for name in one)


def test_with_dropout_it_is_the_op_on_the_output_of_the_layer_to_the_bit() -> None:
    inputs = layer_inputs(replace(FP32, h=3))
    layer = {name: inputs.tensors[name] for name in ("x", "weight", "bias")}
    torch.manual_seed(7)
    y = ops.linear(**inputs.tensors, scaling=0.5, dropout_p=0.3)
    plain = ops.linear(**layer, A=torch.zeros(1, 96, 1), B=torch.zeros(1, 1, 80), scaling=1.0)
    adapter = {name: t for name, t in inputs.adapter().items() if name not in layer}
    torch.manual_seed(7)
    assert same_bits(y, ops.gralora(layer["x"], plain, **adapter, scaling=0.5, dropout_p=0.3))
    evaluated = ops.linear(**inputs.tensors, scaling=0.5, dropout_p=0.3, training=False)
    assert same_bits(evaluated, ops.linear(**inputs.tensors, scaling=0.5)) and not same_bits(evaluated, y)


@pytest.mark.parametrize("wanted", ["x", "A", "B", "A_general", "B_general"])
def test_with_dropout_one_gradient_alone_has_the_bits_that_it_has_among_all(wanted: str) -> None:
    inputs, op = layer_inputs(replace(FP32, h=3)), dropped(5, 0.3)
    every = results(inputs, op)
    leaf = inputs.tensors[wanted].requires_grad_()
    y = op(**inputs.tensors, scaling=inputs.scaling)
    assert same_bits(torch.autograd.grad(y, leaf, inputs.grad)[0], every[wanted])
