# SPDX-License-Identifier: Apache-2.0
"""One to four tokens, as in generation: kernels of their own that read the parameters as they lie (csrc/cpu/forward_few.h)."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, NAMES, Case, Inputs, assert_results_near, same_bits, threads, value_and_gradients

from gralora_ext import ops, reference

TOKENS = [1, 2, 3, 4]

# Ranks and widths of blocks that are a few vectors, less than one, or end within one; chunks of
# columns that end within the turns of four rows; strips of y that end within one; the same of the
# hybrid part.
SIZES = [
    (1, 1, 1, 1, 0),
    (2, 96, 160, 8, 8),
    (2, 288, 288, 4, 16),
    (3, 257, 39, 7, 5),
    (4, 50, 75, 18, 33),
    (1, 519, 1101, 64, 1),
    (2, 64, 1040, 72, 0),
    (4, 50, 75, 18, 0),
    (8, 72, 24, 1, 0),
]


def forward(inputs: Inputs, rows: slice, **options: object) -> torch.Tensor:
    some = {name: t[rows] if name in ("x", "base") else t for name, t in inputs.tensors.items()}
    return ops.gralora(**some, scaling=inputs.scaling, **options)


@pytest.mark.parametrize("layout", ["contiguous", "offset", "row_slice", "column_stride"])
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("k", "n", "m", "rb", "h"), SIZES)
def test_few_tokens_are_right_and_the_same_for_any_number_of_threads(
    k: int, n: int, m: int, rb: int, h: int, T: int, layout: str, device: torch.device
) -> None:
    layouts = {f"{name}_layout": layout for name in ("x", "base", "adapter", "grad")}
    inputs = Case((T,), k, n, m, rb, h, **layouts).inputs(device)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(value_and_gradients(ops.gralora, inputs))
    assert_results_near(results[0], inputs)
    for many in results[1:]:
        assert all(same_bits(many[name], results[0][name]) for name in many)


@pytest.mark.parametrize("adapter", DTYPES, ids=lambda d: f"adapter_{NAMES[d]}")
@pytest.mark.parametrize("base", DTYPES, ids=lambda d: f"base_{NAMES[d]}")
@pytest.mark.parametrize("x", DTYPES, ids=lambda d: f"x_{NAMES[d]}")
@pytest.mark.parametrize("T", TOKENS)
def test_few_tokens_take_every_combination_of_dtypes(
    T: int, x: torch.dtype, base: torch.dtype, adapter: torch.dtype, device: torch.device
) -> None:
    inputs = Case((T,), 2, 85, 107, 9, 19, x_dtype=x, base_dtype=base, adapter_dtype=adapter).inputs(device)
    assert_results_near(value_and_gradients(ops.gralora, inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize(("k", "n", "m", "rb", "h"), SIZES)
def test_dropout_of_few_tokens(
    k: int, n: int, m: int, rb: int, h: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = Case((3,), k, n, m, rb, h).uniform(dtype).inputs(device)
    torch.manual_seed(n)
    actual = value_and_gradients(ops.gralora, inputs, dropout_p=0.3)
    torch.manual_seed(n)
    assert_results_near(actual, inputs, dropout_p=0.3, seed=reference.draw_seed(device).cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize(("k", "n", "m", "rb", "h"), SIZES)
def test_each_of_few_tokens_has_the_bits_that_it_has_alone(
    k: int, n: int, m: int, rb: int, h: int, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type != "cpu":
        pytest.skip("kernels for CUDA are chosen by the number of tokens")
    inputs = Case((4,), k, n, m, rb, h).uniform(dtype).inputs(device)
    alone = torch.cat([forward(inputs, slice(t, t + 1)) for t in range(4)])
    for T in TOKENS:
        assert same_bits(forward(inputs, slice(0, T)), alone[:T])


def test_few_tokens_written_into_base(device: torch.device) -> None:
    """Rows of base that lie apart; what lies between them stays."""
    inputs = Case((3,), 2, 60, 83, 8, 8, base_layout="row_slice").inputs(device)
    expected = forward(inputs, slice(None))
    base = inputs.tensors["base"]
    around = torch.as_strided(base, (3, base.stride(0)), (base.stride(0), 1), base.storage_offset() - 2)
    before = around.clone()
    ops.gralora_(**inputs.tensors, scaling=inputs.scaling)
    assert same_bits(base, expected)
    assert same_bits(around[:, :2], before[:, :2]) and same_bits(around[:, -3:], before[:, -3:])
