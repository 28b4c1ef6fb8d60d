# SPDX-License-Identifier: Apache-2.0
"""A merge into parts of a weight has the bits of a merge into the whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gralora_ext import ops
from gralora_ext.checkpoint.strips import merge_strip_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def adapter(k, rb, in_width, out_width, h, dtype=torch.float32):
    weights = {"A": torch.randn(k, in_width, k * rb), "B": torch.randn(k, k * rb, out_width)}
    if h:
        weights |= {"A_general": torch.randn(h, k * in_width), "B_general": torch.randn(k * out_width, h)}
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def check(weight, weights, scaling, fan_in_fan_out, rows, columns):
    whole = ops.merge_(weight.clone(), scaling=scaling, fan_in_fan_out=fan_in_fan_out, **weights)
    for row in range(0, weight.shape[0], rows):
        for column in range(0, weight.shape[1], columns):
            part = weight[row : row + rows, column : column + columns].clone()  # as a buffer: contiguous
            merge_strip_(part, row, column, weights, scaling, fan_in_fan_out)
            weight[row : row + rows, column : column + columns] = part
    assert torch.equal(weight, whole)


@given(
    k=st.integers(1, 4),
    rb=st.integers(1, 9),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    h=st.sampled_from([0, 0, 1, 5]),
    dtype=st.sampled_from(DTYPES),
    adapters=st.sampled_from(DTYPES),
    fan_in_fan_out=st.booleans(),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    scaling=st.floats(-3, 3),
    seed=st.integers(0, 2**20),
)
def test_parts_of_any_shape(k, rb, widths, h, dtype, adapters, fan_in_fan_out, cut, scaling, seed):
    torch.manual_seed(seed)
    weights = adapter(k, rb, *widths, h, adapters)
    shape = (k * widths[1], k * widths[0])
    weight = torch.randn(shape[::-1] if fan_in_fan_out else shape).to(dtype)
    rows, columns = (max(2, round(part * size)) for part, size in zip(cut, weight.shape, strict=True))
    # A transposed weight is never cut so that one column is left, see merge_strip_.
    while fan_in_fan_out and weight.shape[1] > 1 and weight.shape[1] % columns == 1:
        columns += 1
    check(weight, weights, scaling, fan_in_fan_out, rows, columns)


@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strips_of_a_large_weight(dtype, fan_in_fan_out):
    """With several threads, and panels that are cut."""
    torch.manual_seed(0)
    weights = adapter(2, 32, 704, 1000, 8)
    weight = torch.randn((1408, 2000) if fan_in_fan_out else (2000, 1408)).to(dtype)
    check(weight, weights, 0.7, fan_in_fan_out, 523, weight.shape[1])
