# SPDX-License-Identifier: Apache-2.0
"""``ops.merge_`` and ``ops.delta_weight``: against the reference, PEFT's layer and the correctly rounded result."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DTYPES,
    EXTREME_SIZES,
    LAYOUTS,
    MERGE_MISROUNDED,
    NAMES,
    TOLERANCES,
    Case,
    assert_near,
    cases,
    make,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import GraloraConfig, get_peft_model
from torch import Tensor, nn

from gralora_ext import ops, reference

WEIGHT_LAYOUTS = [layout for layout in LAYOUTS if not layout.startswith("expanded")]


def weight_for(case: Case, dtype: torch.dtype, layout: str, fan_in_fan_out: bool, device: torch.device) -> Tensor:
    shape = (case.k * case.m, case.k * case.n)
    generator = torch.Generator().manual_seed(case.seed + 1)
    return make(shape[::-1] if fan_in_fan_out else shape, layout, dtype, generator).to(device)


def assert_merge_near(case: Case, dtype: torch.dtype, layout: str, fan_in_fan_out: bool, device: torch.device) -> None:
    inputs = case.inputs(device)
    options = {"scaling": inputs.scaling, "fan_in_fan_out": fan_in_fan_out}
    weight = weight_for(case, dtype, layout, fan_in_fan_out, device)
    expected = reference.merge_(weight.double().cpu(), **inputs.to(torch.float64).adapter(), **options)
    size = torch.maximum(expected.norm(), weight.double().norm().cpu())  # the sum may cancel where M = N = 1
    kept = {name: t.clone() for name, t in inputs.adapter().items()}
    assert ops.merge_(weight, **inputs.adapter(), **options) is weight
    assert_near("weight", weight, expected, size)
    assert all(same_bits(t, kept[name]) for name, t in inputs.adapter().items())


@given(
    case=cases(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(WEIGHT_LAYOUTS),
    fan_in_fan_out=st.booleans(),
)
@settings(max_examples=200)
def test_merge_equals_the_reference_in_random_cases(
    case: Case, dtype: torch.dtype, layout: str, fan_in_fan_out: bool, device: torch.device
) -> None:
    assert_merge_near(case, dtype, layout, fan_in_fan_out, device)


@given(case=cases(), fan_in_fan_out=st.booleans())
@settings(max_examples=200)
def test_delta_weight_equals_the_reference_in_random_cases(
    case: Case, fan_in_fan_out: bool, device: torch.device
) -> None:
    inputs = case.inputs(device)
    dW = ops.delta_weight(**inputs.adapter(), scaling=inputs.scaling, fan_in_fan_out=fan_in_fan_out)
    wide = inputs.to(torch.float64)
    expected = reference.delta_weight(**wide.adapter(), scaling=inputs.scaling, fan_in_fan_out=fan_in_fan_out)
    squares = wide.squared()
    size = reference.delta_weight(**squares.adapter(), scaling=squares.scaling).sum().sqrt()
    assert dW.dtype == case.adapter_dtype
    assert_near("dW", dW, expected, torch.maximum(expected.norm(), size))


@pytest.mark.parametrize("adapter", DTYPES, ids=lambda d: f"adapter_{NAMES[d]}")
@pytest.mark.parametrize("weight", DTYPES, ids=lambda d: f"weight_{NAMES[d]}")
@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["", "fan_in_fan_out"])
def test_merge_takes_every_combination_of_dtypes(
    fan_in_fan_out: bool, weight: torch.dtype, adapter: torch.dtype, device: torch.device
) -> None:
    case = Case(k=4, n=33, m=41, rb=5, h=3, adapter_dtype=adapter)
    assert_merge_near(case, weight, "contiguous", fan_in_fan_out, device)


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["", "fan_in_fan_out"])
@pytest.mark.parametrize("h", [0, 2], ids=["", "hybrid"])
def test_merge_writes_into_every_layout(h: int, fan_in_fan_out: bool, layout: str, device: torch.device) -> None:
    assert_merge_near(Case(k=3, n=37, m=29, rb=2, h=h), torch.float32, layout, fan_in_fan_out, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_merge_leaves_what_lies_outside_a_view(dtype: torch.dtype, device: torch.device) -> None:
    """The middle part of a fused projection's weight, of which every other column belongs to another matrix."""
    case = Case(k=2, n=19, m=23, rb=2, h=2)
    whole = make((60, 80), "contiguous", dtype, torch.Generator().manual_seed(3)).to(device)
    before = whole.clone()
    view = whole[7 : 7 + 46, 1 : 1 + 76 : 2]
    inputs = case.inputs(device)
    expected = reference.merge_(view.double().cpu(), **inputs.to(torch.float64).adapter(), scaling=0.5)
    ops.merge_(view, **inputs.adapter(), scaling=0.5)
    assert_near("view", view, expected)
    view.copy_(before[7 : 7 + 46, 1 : 1 + 76 : 2])
    assert same_bits(whole, before)


def test_merge_writes_one_part_of_a_fused_weight_like_a_weight_of_its_own(device: torch.device) -> None:
    inputs = Case(k=2, n=16, m=24, h=1).inputs(device)
    fused = make((3 * 48, 32), "contiguous", torch.float32, torch.Generator().manual_seed(3)).to(device)
    alone = fused[48:96].clone()
    ops.merge_(fused[48:96], **inputs.adapter(), scaling=0.5)
    ops.merge_(alone, **inputs.adapter(), scaling=0.5)
    assert torch.equal(fused[48:96], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("adapter", [torch.float32, None], ids=["fp32_adapter", "same_adapter"])
@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["", "fan_in_fan_out"])
def test_16_bit_merge_rounds_nearly_every_weight_correctly(
    fan_in_fan_out: bool, adapter: torch.dtype | None, dtype: torch.dtype, device: torch.device
) -> None:
    case = Case(k=4, n=96, m=64, rb=8, h=8, adapter_dtype=adapter or dtype)
    inputs = case.inputs(device)
    options = {"scaling": inputs.scaling, "fan_in_fan_out": fan_in_fan_out}
    weight = weight_for(case, dtype, "contiguous", fan_in_fan_out, device)
    wide = inputs.to(torch.float64).adapter()
    correct = reference.merge_(weight.double().cpu(), **wide, **options).to(dtype)
    ops.merge_(weight, **inputs.adapter(), **options)
    assert (weight.cpu() != correct).double().mean() < MERGE_MISROUNDED


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_unmerge_returns_the_weight(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(k=4, n=24, m=20, h=3)
    adapter = case.inputs(device).adapter()
    weight = weight_for(case, dtype, "contiguous", False, device)
    before = weight.clone()
    ops.merge_(weight, **adapter, scaling=0.5)
    assert not torch.equal(weight, before)
    merged = weight.clone()
    ops.merge_(weight, **adapter, scaling=-0.5)
    size = torch.maximum(before.double().norm(), merged.double().norm())
    assert_near("weight", weight, before.double(), size, 2 * TOLERANCES[dtype].output)


def test_merge_adds_what_delta_weight_returns(device: torch.device) -> None:
    case = Case(k=3, n=21, m=17, h=2).uniform(torch.float64)
    adapter = case.inputs(device).adapter()
    weight = weight_for(case, torch.float64, "contiguous", False, device)
    expected = weight + ops.delta_weight(**adapter, scaling=0.5)
    assert_near("weight", ops.merge_(weight, **adapter, scaling=0.5), expected)


def test_merged_layer_gives_what_the_unmerged_one_gives(device: torch.device) -> None:
    case = Case(leading=(11,), k=4, n=12, m=10, h=3).uniform(torch.float64)
    inputs = case.inputs(device)
    weight = weight_for(case, torch.float64, "contiguous", False, device)
    x = inputs.tensors["x"]
    unmerged = ops.gralora(**{**inputs.tensors, "base": x @ weight.T}, scaling=0.5)
    ops.merge_(weight, **inputs.adapter(), scaling=0.5)
    assert_near("y", x @ weight.T, unmerged)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "expanded" not in layout])
def test_merge_reads_every_layout_of_the_adapter(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(k=2, n=9, m=11, h=3, adapter_layout=layout, adapter_dtype=dtype)
    assert_merge_near(case, torch.float32, "contiguous", False, device)


@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["", "fan_in_fan_out"])
@pytest.mark.parametrize(("k", "h"), [(1, 0), (2, 3), (4, 0)])
def test_delta_weight_and_merge_equal_pefts_layer(k: int, h: int, fan_in_fan_out: bool, device: torch.device) -> None:
    torch.manual_seed(k)
    config = GraloraConfig(r=8, hybrid_r=h, gralora_k=k, alpha=24, target_modules=["0"], init_weights=False)
    layer = get_peft_model(nn.Sequential(nn.Linear(24, 24)), config).to(device).base_model.model[0]
    layer.fan_in_fan_out = fan_in_fan_out
    adapter = {"A": layer.gralora_A["default"], "B": layer.gralora_B["default"]}
    if h:
        adapter["A_general"] = layer.gralora_A_general["default"].weight
        adapter["B_general"] = layer.gralora_B_general["default"].weight
    options = {"scaling": layer.scaling["default"], "fan_in_fan_out": fan_in_fan_out}
    dW = ops.delta_weight(**adapter, **options)
    assert not dW.requires_grad
    assert_near("dW", dW, layer.get_delta_weight("default").detach())
    weight = layer.base_layer.weight.detach().clone()
    ops.merge_(weight, **adapter, **options)
    layer.merge()
    assert_near("weight", weight, layer.base_layer.weight.detach())


def test_merge_bumps_the_version_of_the_weight_and_of_its_base(device: torch.device) -> None:
    adapter = Case(k=2, n=4, m=5).inputs(device).adapter()
    whole = torch.zeros(20, 8, device=device)
    view, version = whole[3:13], whole._version
    ops.merge_(view, **adapter, scaling=0.5)
    assert view._version > version
    assert whole._version > version


def test_merge_in_inference_mode_bumps_the_version_of_a_normal_weight(device: torch.device) -> None:
    adapter = Case(k=2, n=4, m=5).inputs(device).adapter()
    weight = torch.zeros(10, 8, device=device)
    version = weight._version
    with torch.inference_mode():
        ops.merge_(weight, **adapter, scaling=0.5)
    assert weight._version > version


def test_raw_merge_refuses_a_leaf_that_requires_grad_as_torch_does(device: torch.device) -> None:
    A, B = Case(k=2, n=4, m=5).inputs(device).adapter().values()
    weight = torch.zeros(10, 8, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        torch.ops.gralora_ext.merge_(weight, A, B, None, None, 0.5, False)
    assert not weight.any()


def test_backward_refuses_a_weight_merged_since_forward(device: torch.device) -> None:
    adapter = Case(k=2, n=4, m=5).inputs(device).adapter()
    weight = torch.zeros(10, 8, device=device)
    y = nn.functional.linear(torch.ones(3, 8, device=device, requires_grad=True), weight)
    ops.merge_(weight, **adapter, scaling=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_merge_writes_a_parameter_that_requires_grad(device: torch.device) -> None:
    """As PEFT's ``weight.data += delta`` does; the parameter stays a leaf, and so does the adapter."""
    adapter = {name: nn.Parameter(t) for name, t in Case(k=2, n=4, m=5, h=1).inputs(device).adapter().items()}
    weight = nn.Parameter(torch.zeros(10, 8, device=device))
    ops.merge_(weight, **adapter, scaling=0.5)
    assert torch.equal(weight.detach(), ops.delta_weight(**adapter, scaling=0.5))
    assert weight.is_leaf
    assert weight.requires_grad
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_merge_works_in_inference_mode(device: torch.device) -> None:
    adapter = Case(k=2, n=4, m=5).inputs(device).adapter()
    with torch.inference_mode():
        weight = torch.zeros(10, 8, device=device)
        ops.merge_(weight, **adapter, scaling=0.5)
        assert torch.equal(weight, ops.delta_weight(**adapter, scaling=0.5))


@pytest.mark.parametrize(("k", "n", "m", "rb", "h"), EXTREME_SIZES)
def test_merge_takes_extreme_sizes(k: int, n: int, m: int, rb: int, h: int, device: torch.device) -> None:
    assert_merge_near(Case(k=k, n=n, m=m, rb=rb, h=h), torch.float32, "contiguous", False, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_merging_zeros_keeps_every_16_bit_weight(dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256).to(device)
    before = weight.clone()
    A, B = torch.zeros(2, 128, 4, device=device), torch.zeros(2, 4, 128, device=device)
    ops.merge_(weight, A, B, scaling=1.0)
    assert torch.equal(weight[before.isfinite()], before[before.isfinite()])
    assert torch.equal(weight.isnan(), before.isnan())
    assert torch.equal(weight.isinf(), before.isinf())
