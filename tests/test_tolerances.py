# SPDX-License-Identifier: Apache-2.0
"""The bounds of ``tolerances.py`` let a right result through, and none that a fault of a kernel would give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import Case, Inputs, assert_results_near, expected_results, value_and_gradients
from torch import Tensor

from gralora_ext import reference

FP32, BF16 = torch.float32, torch.bfloat16
CASE = Case((300,), 2, 100, 90, 8, 5)


def in_their_dtypes(results: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Float64 results, each rounded once to the dtype that it must have."""
    return {name: t.to(inputs.tensors["base" if name == "y" else name].dtype) for name, t in results.items()}


def right(inputs: Inputs) -> dict[str, Tensor]:
    return expected_results(inputs)[0]


def two_pieces_of_parameters(inputs: Inputs) -> dict[str, Tensor]:
    """Each as the sum of two bfloat16, where float32 takes three."""
    wide = inputs.to(torch.float64)
    for name, t in inputs.adapter().items():
        first = t.to(BF16).to(FP32)
        wide.tensors[name] = (first + (t - first).to(BF16).to(FP32)).double()
    return value_and_gradients(reference.gralora, wide)


def sums_cut_toward_zero(inputs: Inputs) -> dict[str, Tensor]:
    """dB as a sum over the tokens that loses half an ulp at each, toward zero."""
    results = right(inputs)
    g, wide = inputs.grad.double(), inputs.to(torch.float64).tensors
    k, r, m = wide["B"].shape
    n = wide["A"].shape[1]
    H = torch.einsum("tni,nic->tnc", wide["x"].view(-1, k, n), wide["A"])
    U = H.view(-1, k, k, r // k).transpose(1, 2).reshape(-1, k, r)
    total = torch.zeros(k, r, m, dtype=torch.float64)
    for u, row in zip(U, g.view(-1, k, m), strict=True):
        total += inputs.scaling * u[:, :, None] * row[:, None, :]
        total *= 1 - 2.0**-25
    results["B"] = total
    return results


def one_token_left_out(inputs: Inputs) -> dict[str, Tensor]:
    """Of the gradients of parameters."""
    wide = inputs.to(torch.float64)
    without = Inputs(dict(wide.tensors), wide.grad.clone(), wide.scaling)
    without.grad[-1] = 0
    fewer = value_and_gradients(reference.gralora, without)
    return {name: fewer[name] if name in inputs.adapter() else t for name, t in right(inputs).items()}


def another_scale(inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of parameters by 1.02, as where forward and backward keep other shares."""
    return {name: t * 1.02 if name in inputs.adapter() else t for name, t in right(inputs).items()}


def dx_rounded_at_each_rank(inputs: Inputs) -> dict[str, Tensor]:
    """A sum in bfloat16, of 64 parts."""
    results = right(inputs)
    parts = [torch.zeros_like(results["x"], dtype=BF16)]
    for share in torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(0):
        parts.append((parts[-1].double() + share * results["x"]).to(BF16))
    results["x"] = parts[-1].double()
    return results


def a_column_of_dx_left_out(inputs: Inputs) -> dict[str, Tensor]:
    """As where a tile ends too early: one of 3,600."""
    results = right(inputs)
    results["x"][:, -1] = 0
    return results


@pytest.mark.parametrize("dtype", [torch.float64, FP32, torch.float16, BF16])
def test_what_is_rounded_once_is_right(dtype: torch.dtype) -> None:
    inputs = CASE.uniform(dtype).inputs()
    assert_results_near(in_their_dtypes(right(inputs), inputs), inputs)


@pytest.mark.parametrize(
    ("fault", "case", "dtype"),
    [
        (two_pieces_of_parameters, CASE, FP32),
        (sums_cut_toward_zero, CASE, FP32),
        (one_token_left_out, Case((3500,), 2, 20, 24, 8, 5), BF16),
        (another_scale, CASE, BF16),
        (dx_rounded_at_each_rank, CASE, BF16),
        (a_column_of_dx_left_out, Case((9,), 2, 1800, 20, 4), BF16),
    ],
)
def test_a_fault_is_seen(fault: Callable[[Inputs], dict[str, Tensor]], case: Case, dtype: torch.dtype) -> None:
    inputs = case.uniform(dtype).inputs()
    assert_results_near(in_their_dtypes(right(inputs), inputs), inputs)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_results_near(in_their_dtypes(fault(inputs), inputs), inputs)
