# SPDX-License-Identifier: Apache-2.0
"""The specification itself: against its formulas as loops, PEFT's layer, and Philox's published values."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import Case, Inputs, assert_near, value_and_gradients
from peft import GraloraConfig, get_peft_model
from torch import Tensor, nn

from gralora_ext import reference

MASK32 = 0xFFFFFFFF


def loops(inputs: Inputs) -> Tensor:
    """y of a 2-D x by the formulas of the contract, one element at a time."""
    x, base, A, B = (inputs.tensors[name] for name in ("x", "base", "A", "B"))
    k, n_width, r = A.shape
    m_width, rb = B.shape[2], r // k
    y = base.clone()
    for t, j, o in product(range(len(x)), range(k), range(m_width)):
        for n, q in product(range(k), range(rb)):
            H = sum(x[t, n * n_width + i] * A[n, i, j * rb + q] for i in range(n_width))
            y[t, j * m_width + o] += inputs.scaling * H * B[j, n * rb + q, o]
        if "A_general" in inputs.tensors:
            Ag, Bg = inputs.tensors["A_general"], inputs.tensors["B_general"]
            y[t, j * m_width + o] += inputs.scaling * (Ag @ x[t]) @ Bg[j * m_width + o]
    return y


def peft_layer(case: Case, inputs: Inputs, dtype: torch.dtype, **config: object) -> nn.Module:
    """PEFT's own layer over a base of random weights, with the adapter of ``inputs``."""
    N, M = case.k * case.n, case.k * case.m
    r = case.k * case.rb
    alpha = inputs.scaling * (r + case.h)
    settings = GraloraConfig(
        r=r, hybrid_r=case.h, gralora_k=case.k, alpha=alpha, target_modules=["0"], gralora_dropout=0.0, **config
    )
    torch.manual_seed(case.seed)
    model = get_peft_model(nn.Sequential(nn.Linear(N, M)), settings).to(dtype)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.gralora_A["default"].copy_(inputs.tensors["A"])
        layer.gralora_B["default"].copy_(inputs.tensors["B"])
        if case.h:
            layer.gralora_A_general["default"].weight.copy_(inputs.tensors["A_general"])
            layer.gralora_B_general["default"].weight.copy_(inputs.tensors["B_general"])
    return layer


def philox_by_integers(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox-4x32-10 in Python's own integers, all four counter words."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & MASK32, (first >> 32) ^ c3 ^ k1, first & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


@pytest.mark.parametrize("h", [0, 2])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_forward_is_the_formula_element_by_element(k: int, h: int) -> None:
    inputs = Case(leading=(2,), k=k, n=3, m=4, rb=2, h=h).uniform(torch.float64).inputs()
    y = reference.gralora(**inputs.tensors, scaling=inputs.scaling)
    assert_near("y", y, loops(inputs))


@pytest.mark.parametrize("h", [0, 2])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_delta_weight_is_what_forward_multiplies_by(k: int, h: int) -> None:
    inputs = Case(leading=(5,), k=k, n=3, m=4, rb=2, h=h).uniform(torch.float64).inputs()
    y = reference.gralora(**inputs.tensors, scaling=inputs.scaling)
    dW = reference.delta_weight(**inputs.adapter(), scaling=inputs.scaling)
    assert_near("y", y, inputs.tensors["base"] + inputs.tensors["x"] @ dW.T)


def test_exchange_is_its_own_inverse_and_no_identity() -> None:
    H = torch.arange(2 * 3 * 6).view(2, 3, 6)
    assert torch.equal(reference.exchange(reference.exchange(H)), H)
    assert not torch.equal(reference.exchange(H), H)


@pytest.mark.parametrize("leading", [(6,), (2, 5)], ids=["2d", "3d"])
@pytest.mark.parametrize(("k", "h"), [(1, 0), (2, 0), (4, 3)])
def test_forward_and_gradients_are_those_of_pefts_layer(k: int, h: int, leading: tuple[int, ...]) -> None:
    case = Case(leading=leading, k=k, n=6, m=5, rb=2, h=h).uniform(torch.float64)
    inputs = case.inputs()
    layer = peft_layer(case, inputs, torch.float64)
    x = inputs.tensors["x"].requires_grad_()
    y = layer(x)
    parameters = [layer.gralora_A["default"], layer.gralora_B["default"]]
    if h:
        parameters += [layer.gralora_A_general["default"].weight, layer.gralora_B_general["default"].weight]
    through_x, *theirs = torch.autograd.grad(y, [x, *parameters], inputs.grad)

    inputs.tensors["base"] = layer.base_layer(x).detach()
    ours = value_and_gradients(reference.gralora, inputs)
    assert_near("y", ours["y"], y.detach())
    assert_near("x", ours["x"], through_x - inputs.grad @ layer.base_layer.weight)
    for name, gradient in zip(inputs.adapter(), theirs, strict=True):
        assert_near(name, ours[name], gradient)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(("k", "h"), [(1, 0), (2, 3), (4, 0)])
def test_delta_weight_and_merge_are_those_of_pefts_layer(k: int, h: int, fan_in_fan_out: bool) -> None:
    case = Case(k=k, n=5, m=5, rb=2, h=h).uniform(torch.float64)
    inputs = case.inputs()
    layer = peft_layer(case, inputs, torch.float64)
    layer.fan_in_fan_out = fan_in_fan_out
    options = {"scaling": inputs.scaling, "fan_in_fan_out": fan_in_fan_out}
    assert_near("dW", reference.delta_weight(**inputs.adapter(), **options), layer.get_delta_weight("default").detach())
    weight = layer.base_layer.weight.detach().clone()
    merged = reference.merge_(weight, **inputs.adapter(), **options)
    layer.merge()
    assert merged is weight
    assert_near("weight", weight, layer.base_layer.weight.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rounds_once(dtype: torch.dtype) -> None:
    inputs = Case(leading=(40,), n=24, m=24, h=3).uniform(dtype).inputs()
    y = reference.gralora(**inputs.tensors, scaling=inputs.scaling)
    wide = inputs.to(torch.float64)
    rounded = reference.gralora(**wide.tensors, scaling=wide.scaling).to(dtype)
    assert (y != rounded).float().mean() < 0.02


def test_integer_philox_gives_the_published_values() -> None:
    zero, ones = (0, 0, 0, 0), (MASK32,) * 4
    assert philox_by_integers(zero, (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox_by_integers(ones, (MASK32, MASK32)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    words = philox_by_integers(counter, (0xA4093822, 0x299F31D0))
    assert words == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
def test_tensor_philox_equals_integer_philox_over_64_bit_counters_and_keys(seed: int) -> None:
    counters = [0, 1, 2, MASK32, MASK32 + 1, 2**40 + 12345, 2**62 + 1]
    words = reference.philox_4x32_10(seed, torch.tensor(counters))
    key = (seed & MASK32, (seed >> 32) & MASK32)
    for counter, row in zip(counters, words.tolist(), strict=True):
        assert tuple(row) == philox_by_integers((counter & MASK32, counter >> 32, 0, 0), key)


def test_mask_numbers_elements_row_by_row() -> None:
    seed = torch.tensor([-5])
    flat = reference.dropout_mask(seed, (6 * 7,), 0.4)
    assert torch.equal(reference.dropout_mask(seed, (2, 3, 7), 0.4), flat.view(2, 3, 7))
    assert torch.equal(reference.dropout_mask(seed, (13,), 0.4), flat[:13])


def test_dropout_zeroes_and_rescales_the_input_of_both_parts() -> None:
    inputs = Case(leading=(9,), h=4).uniform(torch.float64).inputs()
    seed = torch.tensor([77])
    y = reference.gralora(**inputs.tensors, scaling=inputs.scaling, dropout_p=0.25, seed=seed)
    keep = reference.dropout_mask(seed, inputs.tensors["x"].shape, 0.25)
    inputs.tensors["x"] = inputs.tensors["x"] * keep / 0.75
    assert_near("y", y, reference.gralora(**inputs.tensors, scaling=inputs.scaling))
