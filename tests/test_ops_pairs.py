# SPDX-License-Identifier: Apache-2.0
"""``ops.gralora`` where activations and adapters are all bfloat16, multiplied in pairs by AMX or AVX512-BF16 (csrc/cpu/product_pairs.h)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import MERGE_MISROUNDED, NAMES, Case, assert_results_near, cases, same_bits, threads, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import GraloraConfig, get_peft_model
from torch import nn

from gralora_ext import build_info, ops, reference

BF16 = torch.bfloat16
ROUNDED_FROM = 5  # tokens: kTokensToRound

# An even and an odd number of tokens, in one segment and in several; widths of blocks that are
# even, odd, a part of a vector and of several chunks; ranks of a block that are even, odd, whole
# vectors (rounded as they are stored) and more; the hybrid part.
TOKENS = [5, 64, 97, 1301]
SIZES = [
    (1, 2, 4, 2, 0),
    (3, 30, 40, 12, 2),
    (2, 31, 40, 16, 4),
    (2, 600, 96, 24, 0),
    (4, 96, 530, 5, 6),
    (2, 64, 64, 3, 3),
    (2, 64, 96, 32, 0),
    (4, 48, 40, 16, 0),
]


@given(case=cases(), T=st.integers(ROUNDED_FROM, 300))
@settings(max_examples=200)
def test_results_equal_the_references_in_random_cases(case: Case, T: int, device: torch.device) -> None:
    inputs = replace(case.uniform(BF16), leading=(T,)).inputs(device)
    assert_results_near(value_and_gradients(ops.gralora, inputs), inputs)


@pytest.mark.parametrize("layout", ["contiguous", "padded", "offset"])
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("k", "n", "m", "rb", "h"), SIZES)
def test_results_are_right_and_the_same_for_any_number_of_threads(
    k: int, n: int, m: int, rb: int, h: int, T: int, layout: str, device: torch.device
) -> None:
    layouts = {f"{name}_layout": layout for name in ("x", "base", "adapter", "grad")}
    inputs = Case((T,), k, n, m, rb, h, **layouts).uniform(BF16).inputs(device)
    results = []
    for count in (1, 2, 3, 5):
        with threads(count):
            results.append(value_and_gradients(ops.gralora, inputs))
    assert_results_near(results[0], inputs)
    for many in results[1:]:
        assert all(same_bits(many[name], results[0][name]) for name in many)


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("k", "n", "m", "rb", "h"), SIZES)
def test_dropout(k: int, n: int, m: int, rb: int, h: int, T: int, device: torch.device) -> None:
    """In pairs too: x is read with zeros, and the factor 1/(1-p) is that of the sums."""
    inputs = Case((T,), k, n, m, rb, h).uniform(BF16).inputs(device)
    torch.manual_seed(T)
    actual = value_and_gradients(ops.gralora, inputs, dropout_p=0.3)
    torch.manual_seed(T)
    assert_results_near(actual, inputs, dropout_p=0.3, seed=reference.draw_seed(device).cpu())


def share_of_y_not_rounded_once(T: int, device: torch.device) -> float:
    """Elements of y that differ from the result in float32, rounded."""
    inputs = Case((T,), 2, 96, 80, 16).uniform(BF16).inputs(device)
    tensors = {**inputs.tensors, "base": torch.zeros_like(inputs.tensors["base"])}
    wide = ops.gralora(**{**tensors, "base": tensors["base"].float()}, scaling=inputs.scaling)
    y = ops.gralora(**tensors, scaling=inputs.scaling)
    return (y != wide.to(BF16)).double().mean().item()


@pytest.mark.parametrize("T", [1, 2, 4])
def test_ranks_of_fewer_tokens_stay_float32(T: int, device: torch.device) -> None:
    share = share_of_y_not_rounded_once(T, device)
    assert share <= (0.0 if device.type == "cpu" else MERGE_MISROUNDED)  # other kernels there, where base is float32


def test_ranks_are_rounded_where_the_processor_multiplies_pairs(device: torch.device) -> None:
    processor = Path("/proc/cpuinfo")
    words = processor.read_text().split() if processor.exists() else []
    if device.type != "cpu" or build_info()["cpu_capability"] != "avx512":
        pytest.skip("the kernels have fewer instructions")
    if not build_info()["cpu_amx"] and ("avx512_bf16" not in words or "GenuineIntel" in words):
        pytest.skip("neither AMX nor AVX512-BF16, or that is slower than floats")
    assert share_of_y_not_rounded_once(ROUNDED_FROM, device) > 0.1


@pytest.mark.parametrize(("T", "N", "M", "r", "k", "h"), [(64, 576, 1536, 32, 2, 0), (300, 320, 256, 64, 4, 8)])
def test_errors_are_not_greater_than_pefts(
    T: int, N: int, M: int, r: int, k: int, h: int, device: torch.device
) -> None:
    """PEFT's layer rounds the ranks too, and the path before it is added."""
    torch.manual_seed(0)
    config = GraloraConfig(r=r, hybrid_r=h, gralora_k=k, target_modules=["0"], init_weights=False)
    model = get_peft_model(
        nn.Sequential(nn.Linear(N, M, bias=False)).to(device, BF16), config, autocast_adapter_dtype=False
    )
    layer = model.base_model.model[0]
    x = torch.randn(T, N, device=device).to(BF16).requires_grad_()
    grad = torch.randn(T, M, device=device).to(BF16)
    adapter = {"A": layer.gralora_A["default"], "B": layer.gralora_B["default"]}
    if h > 0:
        adapter["A_general"] = layer.gralora_A_general["default"].weight
        adapter["B_general"] = layer.gralora_B_general["default"].weight
    base = torch.zeros(T, M, device=device, dtype=BF16)
    layer.base_layer.weight.data.zero_()
    scaling = layer.scaling["default"]

    wide = {name: t.detach().double().requires_grad_() for name, t in {"x": x, **adapter}.items()}
    expected = reference.gralora(base=base.double(), **wide, scaling=scaling)
    wanted = [expected, *torch.autograd.grad(expected, list(wide.values()), grad.double())]

    def errors(y: torch.Tensor) -> list[torch.Tensor]:
        results = [y, *torch.autograd.grad(y, [x, *adapter.values()], grad)]
        return [(a.double() - b).norm() / b.norm() for a, b in zip(results, wanted, strict=True)]

    ours = errors(ops.gralora(x, base, **adapter, scaling=scaling))
    theirs = errors(layer(x))
    for name, our, their in zip(["y", "x", *adapter], ours, theirs, strict=True):
        assert our <= 1.05 * their, f"{name}: error {our:.2e}, PEFT's {their:.2e}"


@pytest.mark.parametrize("name", ["x", "base", "A", "B"])
def test_not_a_number_stays_in_its_rows_and_blocks(name: str, device: torch.device) -> None:
    """No pair brings an element of another token, block or tile into a sum that it is not part of."""
    k, n, m, r = 2, 48, 40, 8
    inputs = Case((101,), k, n, m, r // k).uniform(BF16).inputs(device)
    clean = value_and_gradients(ops.gralora, inputs)
    flat = inputs.tensors[name]
    where = {"x": (100, 5), "base": (100, 5), "A": (1, 7, 3), "B": (1, 3, 7)}[name]
    flat[where] = float("nan")
    results = value_and_gradients(ops.gralora, inputs)
    expected = value_and_gradients(reference.gralora, inputs.to(torch.float64))
    for result, t in results.items():
        assert torch.equal(t.isnan().cpu(), expected[result].isnan()), result
        if not t.isnan().any():
            assert same_bits(t, clean[result])


@pytest.mark.parametrize("wanted", ["x", "A", "B", "AB", "xA", "xB"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("x_dtype", [BF16, torch.float32], ids=lambda d: f"x_{NAMES[d]}")
@pytest.mark.parametrize("h", [0, 3, 4])
def test_each_gradient_is_the_same_whichever_others_are_wanted(
    h: int, x_dtype: torch.dtype, dropout_p: float, wanted: str, device: torch.device
) -> None:
    inputs = replace(Case((97,), 2, 96, 80, 8, h).uniform(BF16), x_dtype=x_dtype).inputs(device)
    torch.manual_seed(0)
    complete = value_and_gradients(ops.gralora, inputs, dropout_p=dropout_p)
    leaves = {name: t.detach().clone().requires_grad_(name[0] in wanted) for name, t in inputs.tensors.items()}
    torch.manual_seed(0)
    ops.gralora(**leaves, scaling=inputs.scaling, dropout_p=dropout_p).backward(inputs.grad)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name[0] in wanted)
        assert leaf.grad is None or same_bits(leaf.grad, complete[name])
