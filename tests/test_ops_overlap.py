# SPDX-License-Identifier: Apache-2.0
"""What is written in place must be one element per place, and apart from what is read: checked before anything is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from helpers import Case, Inputs, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gralora_ext import ops

CASE = Case(leading=(7,), k=2, n=4, m=5, rb=3, h=3)  # N = 8, M = 10, r = 6
OTHERS = ("A", "B", "A_general", "B_general")


def assert_refused(call: Callable[..., object], memory: Tensor, message: str, **arguments: object) -> None:
    before = memory.clone()
    with pytest.raises(ValueError, match=message):
        call(**arguments, scaling=0.5)
    assert same_bits(memory, before)


def overlapping(sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Strides by which a tensor of two dimensions overlaps itself."""
    return {"rows": (sizes[1] - 1, 1), "columns": (1, sizes[0] - 1), "windows": (1, 1), "expanded": (0, 1)}


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("how", overlapping((10, 8)))
def test_a_weight_that_overlaps_itself_is_refused(how: str, fan_in_fan_out: bool) -> None:
    sizes, memory = ((8, 10) if fan_in_fan_out else (10, 8)), torch.randn(200)
    weight = memory.as_strided(sizes, overlapping(sizes)[how])
    adapter = CASE.inputs().adapter()
    message = "weight must not overlap itself"
    assert_refused(ops.merge_, memory, message, weight=weight, **adapter, fan_in_fan_out=fan_in_fan_out)


def places(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    indices = itertools.product(*(range(size) for size in sizes))
    return [sum(i * stride for i, stride in zip(index, strides, strict=True)) for index in indices]


@settings(max_examples=300 if settings().derandomize else 2000)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 13)), min_size=1, max_size=4), st.integers(0, 3))
def test_exactly_what_overlaps_itself_is_refused(dims: list[tuple[int, int]], offset: int) -> None:
    sizes, strides = zip(*dims, strict=True)
    at = places(sizes, strides)
    memory = torch.randn(offset + max(at) + 1)
    base = memory.as_strided(sizes, strides, offset)
    inputs = Case(leading=sizes[:-1], k=1, n=3, m=sizes[-1], rb=2).inputs()
    call = {**inputs.tensors, "base": base}
    if len(set(at)) < len(at):
        assert_refused(ops.gralora_, memory, "base must not overlap itself", **call)
        return
    expected, before = ops.gralora(**call, scaling=0.5), memory.clone()
    assert same_bits(ops.gralora_(**call, scaling=0.5), expected)
    beside = sorted(set(range(len(memory))) - {offset + place for place in at})
    assert same_bits(memory[beside], before[beside])


def in_one_buffer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors one after the other in one storage, as engines that shard or flatten parameters lay them out."""
    parts = torch.cat([t.flatten() for t in tensors.values()]).split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts, strict=True)}


def test_neighbours_in_one_storage_are_apart() -> None:
    inputs = CASE.inputs()
    expected = ops.gralora(**inputs.tensors, scaling=0.5)
    assert same_bits(ops.gralora_(**in_one_buffer(inputs.tensors), scaling=0.5), expected)
    adapter, weight = inputs.adapter(), torch.randn(10, 8)
    expected = ops.merge_(weight.clone(), **adapter, scaling=0.5)
    assert same_bits(ops.merge_(**in_one_buffer({"weight": weight, **adapter}), scaling=0.5), expected)


def over(written: Tensor, other: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """(memory, written, other) of the same shapes, which share elements at an end, or whose rows take turns."""
    if how == "woven":
        rows = math.lcm(written.shape[0], other.shape[0])
        memory = torch.randn(rows, written.numel() + other.numel())
        return (
            memory,
            memory.as_strided(written.shape, (memory.shape[1], 1)),
            memory.as_strided(other.shape, (memory.shape[1], *other.stride()[1:]), written.numel()),
        )
    memory = torch.randn(written.numel() + other.numel())
    if how == "first":  # the last element of other is the first one of written
        start, other_start = other.numel() - 1, 0
    else:
        start, other_start = 0, written.numel() - 1
    return (
        memory,
        memory[start:][: written.numel()].view_as(written),
        memory[other_start:][: other.numel()].view_as(other),
    )


@pytest.mark.parametrize("how", ["first", "last", "woven"])
@pytest.mark.parametrize("name", ["x", *OTHERS])
def test_a_base_that_shares_memory_is_refused(name: str, how: str) -> None:
    inputs = CASE.inputs()
    memory, base, other = over(inputs.tensors["base"], inputs.tensors[name], how)
    message = f"base must not share {name}'s memory"
    assert_refused(ops.gralora_, memory, message, **{**inputs.tensors, "base": base, name: other})


@pytest.mark.parametrize("how", ["first", "last", "woven"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_weight_that_shares_memory_is_refused(name: str, how: str) -> None:
    inputs: Inputs = CASE.inputs()
    memory, weight, other = over(torch.empty(10, 8), inputs.tensors[name], how)
    message = f"weight must not share {name}'s memory"
    assert_refused(ops.merge_, memory, message, weight=weight, **{**inputs.adapter(), name: other})


def test_a_weight_of_another_dtype_in_the_same_bytes_is_refused() -> None:
    inputs, memory = CASE.inputs(), torch.randn(200)
    adapter = {**inputs.adapter(), "A": memory[:48].view(2, 4, 6)}
    weight = memory.view(torch.bfloat16)[90:170].view(10, 8)  # the floats 45 to 85
    assert_refused(ops.merge_, memory, "weight must not share A's memory", weight=weight, **adapter)


def test_empty_tensors_share_nothing() -> None:
    inputs = Case(leading=(0,), n=4, m=5).inputs()
    memory = torch.randn(100)
    call = {**inputs.tensors, "A": memory[:48].view(2, 4, 6), "base": memory[:0].view(0, 10)}
    assert ops.gralora_(**call, scaling=0.5).shape == (0, 10)
