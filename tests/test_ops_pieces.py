# SPDX-License-Identifier: Apache-2.0
"""``ops.gralora`` where adapters of other dtypes meet bfloat16, as sums of bfloat16 pieces by AMX (csrc/cpu/split_bf16.h)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import NAMES, Case, assert_results_near, cases, same_bits, threads, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_ext import build_info, ops, reference

BF16 = torch.bfloat16
SPLIT_FROM = 128  # tokens: kTokensToSplit

# Widths of blocks that are even, odd, a part of a tile and of several chunks; ranks that are whole
# tiles and that are not
SIZES = [
    (1, 2, 4, 2, 0),
    (3, 30, 40, 12, 2),
    (2, 31, 40, 16, 4),
    (2, 600, 96, 24, 0),
    (4, 96, 530, 5, 7),
    (2, 64, 96, 32, 32),
]
adapters = pytest.mark.parametrize("adapter", [torch.float32, torch.float16], ids=NAMES.get)


@pytest.fixture(autouse=True)
def amx(device: torch.device) -> None:
    """Without AMX, floats multiply here, which other tests see to; CUDA's kernels make pieces of their own."""
    if device.type == "cpu" and not build_info()["cpu_amx"]:
        pytest.skip("the kernels do not use AMX here; tests/cpp/test_amx runs them with its instructions in C++")


def beside_bf16(case: Case, adapter: torch.dtype) -> Case:
    return replace(case.uniform(BF16), adapter_dtype=adapter)


@given(case=cases(), T=st.integers(SPLIT_FROM, 300), adapter=st.sampled_from([torch.float32, torch.float16]))
@settings(max_examples=100)
def test_results_equal_the_references_in_random_cases(
    case: Case, T: int, adapter: torch.dtype, device: torch.device
) -> None:
    inputs = replace(beside_bf16(case, adapter), leading=(T,)).inputs(device)
    assert_results_near(value_and_gradients(ops.gralora, inputs), inputs)


@adapters
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("T", [SPLIT_FROM - 1, SPLIT_FROM, 161, 1301])
@pytest.mark.parametrize(("k", "n", "m", "rb", "h"), SIZES)
def test_results_are_right_and_the_same_for_any_number_of_threads(
    k: int, n: int, m: int, rb: int, h: int, T: int, dropout_p: float, adapter: torch.dtype, device: torch.device
) -> None:
    inputs = beside_bf16(Case((T,), k, n, m, rb, h), adapter).inputs(device)
    results = []
    for count in (1, 2, 3):
        torch.manual_seed(T)
        with threads(count):
            results.append(value_and_gradients(ops.gralora, inputs, dropout_p=dropout_p))
    torch.manual_seed(T)
    seed = {"dropout_p": dropout_p, "seed": reference.draw_seed(device).cpu()} if dropout_p > 0 else {}
    assert_results_near(results[0], inputs, **seed)
    for many in results[1:]:
        assert all(same_bits(many[name], results[0][name]) for name in many)


@adapters
@pytest.mark.parametrize("name", ["x", "base", "A", "B"])
def test_not_a_number_stays_in_its_rows_and_blocks(name: str, adapter: torch.dtype, device: torch.device) -> None:
    k, n, m, r = 2, 48, 40, 8
    inputs = beside_bf16(Case((SPLIT_FROM + 5,), k, n, m, r // k), adapter).inputs(device)
    where = {"x": (100, 5), "base": (100, 5), "A": (1, 7, 3), "B": (1, 3, 7)}[name]
    inputs.tensors[name][where] = float("nan")
    results = value_and_gradients(ops.gralora, inputs)
    expected = value_and_gradients(reference.gralora, inputs.to(torch.float64))
    for result, t in results.items():
        assert torch.equal(t.isnan().cpu(), expected[result].isnan()), result
