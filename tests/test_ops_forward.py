# SPDX-License-Identifier: Apache-2.0
"""``ops.gralora`` forward: against the reference in float64 and against PEFT's own layer."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    NAMES,
    Case,
    Inputs,
    assert_near,
    assert_results_near,
    cases,
    same_bits,
    threads,
)
from hypothesis import given, settings
from peft import GraloraConfig, get_peft_model
from torch import nn

from gralora_ext import ops


def assert_forward_near(inputs: Inputs, **options: object) -> None:
    with torch.no_grad():
        y = ops.gralora(**inputs.tensors, scaling=inputs.scaling, **options)
    assert_results_near({"y": y}, inputs)


@given(case=cases())
@settings(max_examples=400)
def test_forward_equals_the_reference_in_random_cases(case: Case, device: torch.device) -> None:
    assert_forward_near(case.inputs(device))


@pytest.mark.parametrize("leading", [(), (9,), (3, 5), (2, 3, 4), (2, 1, 2, 3)], ids=lambda s: f"{len(s) + 1}d")
@pytest.mark.parametrize("base", LAYOUTS, ids=lambda s: f"base_{s}")
@pytest.mark.parametrize("x", LAYOUTS, ids=lambda s: f"x_{s}")
def test_forward_reads_every_layout_of_every_rank(
    x: str, base: str, leading: tuple[int, ...], device: torch.device
) -> None:
    inputs = Case(leading=leading, k=3, n=7, m=5, rb=2, h=2, x_layout=x, base_layout=base).inputs(device)
    before = [t.clone() for t in inputs.tensors.values()]
    assert_forward_near(inputs)
    assert all(same_bits(t, kept) for t, kept in zip(inputs.tensors.values(), before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_reads_every_layout_of_the_adapter(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_forward_near(Case(k=2, n=9, m=11, rb=3, h=3, adapter_layout=layout, adapter_dtype=dtype).inputs(device))


def test_forward_takes_more_dimensions_than_any_model_has(device: torch.device) -> None:
    """Twelve leading dimensions of which no two can be viewed as one, in x and in base."""
    permuted = {"x_layout": "leading_permuted", "base_layout": "leading_permuted"}
    assert_forward_near(Case(leading=(1, 2, 1, 2, 2, 1, 2, 2, 1, 2, 2, 2), n=3, m=2, rb=1, **permuted).inputs(device))


@pytest.mark.parametrize("leading", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_no_tokens_give_an_empty_result(leading: tuple[int, ...], device: torch.device) -> None:
    inputs = Case(leading=leading, h=2).inputs(device)
    assert ops.gralora(**inputs.tensors, scaling=1.0).shape == inputs.tensors["base"].shape


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_zero_scaling_returns_a_copy_of_base_to_the_bit(dtype: torch.dtype, device: torch.device) -> None:
    inputs = Case(h=3).uniform(dtype).inputs(device)
    y = ops.gralora(**inputs.tensors, scaling=0.0)
    assert same_bits(y, inputs.tensors["base"])
    assert y.data_ptr() != inputs.tensors["base"].data_ptr()


def test_rows_do_not_depend_on_the_rows_beside_them(device: torch.device) -> None:
    """A NaN or an infinity in one token stays in that token."""
    inputs = Case(leading=(70,), k=4, n=17, m=19, h=2).inputs(device)
    clean = ops.gralora(**inputs.tensors, scaling=1.0)
    inputs.tensors["x"][33, 5] = float("nan")
    inputs.tensors["base"][50, 3] = float("inf")
    y = ops.gralora(**inputs.tensors, scaling=1.0)
    others = [t for t in range(70) if t not in (33, 50)]
    assert same_bits(y[others], clean[others])
    assert y[33].isnan().all()
    assert y[50].isinf().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("n", "m", "rb"), [(16, 8, 4), (40, 24, 8), (17, 19, 1), (260, 40, 2)])
def test_rows_do_not_depend_on_how_many_are_beside_them(
    n: int, m: int, rb: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Registers hold twelve tokens or what is left of them, down to one: every sum is rounded in the same places."""
    if device.type != "cpu":
        pytest.skip("kernels for CUDA are chosen by the number of tokens")
    tensors = Case((48,), 2, n, m, rb, 3).uniform(dtype).inputs(device).tensors
    whole = ops.gralora(**tensors, scaling=1.0)
    for T in range(5, 48):
        some = {name: t[:T] if name in ("x", "base") else t for name, t in tensors.items()}
        assert same_bits(ops.gralora(**some, scaling=1.0), whole[:T])


@pytest.mark.parametrize("layout", ["contiguous", "offset", "padded"])
@pytest.mark.parametrize("T", [1, 5, 97, 300])
@pytest.mark.parametrize(("k", "n", "m", "rb"), [(1, 2, 5, 1), (3, 30, 40, 11), (2, 31, 40, 16), (2, 600, 96, 24)])
def test_ranks_of_bfloat16_activations_and_adapters_stay_float32_where_y_is_float32(
    k: int, n: int, m: int, rb: int, T: int, layout: str, device: torch.device
) -> None:
    """Within float32's tolerance and with the same bits for any number of threads, where two bfloat16 products are one
    instruction (even widths of blocks) and where they are not."""
    bf16 = torch.bfloat16
    case = Case((T,), k, n, m, rb, x_dtype=bf16, adapter_dtype=bf16, x_layout=layout, adapter_layout=layout)
    inputs = case.inputs(device)
    assert_forward_near(inputs)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(ops.gralora(**inputs.tensors, scaling=inputs.scaling))
    assert same_bits(results[1], results[0]) and same_bits(results[2], results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_16_bit_values_are_converted_exactly_over_their_whole_range(dtype: torch.dtype, device: torch.device) -> None:
    """Every finite 16-bit pattern, subnormals included, passes through x and through base unchanged."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite()].to(device)
    patterns = patterns[: len(patterns) // 32 * 32].view(-1, 32)
    unit = torch.eye(32, device=device).unsqueeze(0)
    zeros = torch.zeros(patterns.shape, device=device)
    through_x = ops.gralora(patterns, zeros, unit, unit, scaling=1.0)
    assert torch.equal(through_x, patterns.float())
    through_base = ops.gralora(zeros, patterns, unit, unit, scaling=1.0)
    assert torch.equal(through_base, patterns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_16_bit_results_are_rounded_as_torch_rounds(dtype: torch.dtype, device: torch.device) -> None:
    """To the nearest, ties to even, overflow to infinity, gradual underflow: random floats of which half are ties."""
    if device.type != "cpu":
        pytest.skip("of a summand of a 16-bit y tensor cores get 16 bits, so a tie may go the other way")
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (2048, 32), generator=generator).to(torch.int32)
    if dtype == torch.float16:  # exponents from below the smallest subnormal up to infinity
        bits = (bits & -0x7F800001) | (torch.randint(100, 146, bits.shape, generator=generator).to(torch.int32) << 23)
        bits[::2] = (bits[::2] & ~0x1FFF) | 0x1000
    else:
        bits[::2] = (bits[::2] & ~0xFFFF) | 0x8000
    x = bits.view(torch.float32)
    x = torch.where(x.isfinite(), x, 1.0).to(device)
    unit = torch.eye(32, device=device).unsqueeze(0)
    y = ops.gralora(x, torch.zeros(x.shape, dtype=dtype, device=device), unit, unit, scaling=1.0)
    assert torch.equal(y, x.to(dtype))


@pytest.mark.parametrize("leading", [(11,), (2, 7)], ids=["2d", "3d"])
@pytest.mark.parametrize(("k", "h"), [(1, 0), (2, 0), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=NAMES.get)
def test_forward_equals_pefts_layer(
    dtype: torch.dtype, k: int, h: int, leading: tuple[int, ...], device: torch.device
) -> None:
    layer, x, base, adapter, scaling = peft_call(dtype, k, h, leading, device)
    assert_near("y", ops.gralora(x, base, **adapter, scaling=scaling), layer(x).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_16_bit_forward_is_no_worse_than_pefts_layer(dtype: torch.dtype, device: torch.device) -> None:
    layer, x, base, adapter, scaling = peft_call(dtype, 4, 3, (64,), device)
    exact = ops.gralora(x.double(), base.double(), **{n: t.double() for n, t in adapter.items()}, scaling=scaling)
    ours = (ops.gralora(x, base, **adapter, scaling=scaling).double() - exact).norm()
    theirs = (layer(x).double() - exact).norm()
    assert ours <= theirs


@torch.no_grad()
def peft_call(dtype: torch.dtype, k: int, h: int, leading: tuple[int, ...], device: torch.device):
    """PEFT's own layer with a random adapter in ``dtype``, an x, its base layer's result, and the adapter's tensors."""
    torch.manual_seed(k + h)
    config = GraloraConfig(r=8, hybrid_r=h, gralora_k=k, alpha=24, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 40)), config).to(device, dtype).eval()
    layer = model.base_model.model[0]
    x = torch.randn(*leading, 24).to(device, dtype)
    adapter = {"A": layer.gralora_A["default"], "B": layer.gralora_B["default"]}
    if h:
        adapter["A_general"] = layer.gralora_A_general["default"].weight
        adapter["B_general"] = layer.gralora_B_general["default"].weight
    adapter = {name: t.detach() for name, t in adapter.items()}
    return layer, x, layer.base_layer(x), adapter, layer.scaling["default"]
