# SPDX-License-Identifier: Apache-2.0
"""The kernels that merge with codes: against the same in plain torch, which other devices use, and on numbers of all kinds."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers import DTYPES, NAMES, make, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gralora_ext import ops
from gralora_ext.tuner import chunked, exact
from gralora_ext.tuner.exact import AFTER, BEFORE, DONE, FIRST_NOT_FINITE, LISTED, Kept, Operands, capacity

LAYOUTS = ("contiguous", "offset", "row_slice", "column_stride", "transposed")
native = torch.ops.gralora_ext


def adapter(
    N: int, M: int, k: int, rb: int, h: int, seed: int, size: float = 1.0, dtype: Any = torch.float32
) -> Operands:
    """Whose dW has values of about ``size``."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    A, B = values(k, N // k, k * rb), values(k, k * rb, M // k)
    general = (values(h, N), values(M, h)) if h else (None, None)
    return Operands(str(seed), A, B, *general, size * (rb + h) ** -0.5)


def merge_one_after_the_other(weight: Tensor, adapters: list[Operands], fan_in_fan_out: bool) -> Tensor:
    for o in adapters:
        general = {"A_general": o.A_general, "B_general": o.B_general}
        ops.merge_(weight, o.A, o.B, scaling=o.scaling, fan_in_fan_out=fan_in_fan_out, **general)
    return weight


def in_chunks(weight: Tensor, adapters: list[Operands], fan_in_fan_out: bool) -> tuple[Kept, Tensor]:
    """The merge by plain torch operations, in chunks of few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "ELEMENTS", 3 * weight.shape[1])
        kept, to = Kept(weight, adapters, fan_in_fan_out), weight.clone()
        chunked.merge(kept, to, to)
    return kept, to


@dataclass(frozen=True)
class Problem:
    """A weight and the adapters that are merged into it: grid, rank of a block, general rank, size and dtype of each."""

    N: int
    M: int
    dtype: torch.dtype
    layout: str
    fan_in_fan_out: bool
    adapters: list[tuple[int, int, int, float, torch.dtype]]
    seed: int

    def made(self) -> tuple[Tensor, list[Operands], bool]:
        shape = (self.N, self.M) if self.fan_in_fan_out else (self.M, self.N)
        weight = make(shape, self.layout, self.dtype, torch.Generator().manual_seed(self.seed))
        adapters = [adapter(self.N, self.M, *a[:3], self.seed + i, *a[3:]) for i, a in enumerate(self.adapters)]
        return weight, adapters, self.fan_in_fan_out


@st.composite
def problems(draw: Any) -> Problem:
    dtype = draw(st.sampled_from(DTYPES))
    width = st.sampled_from([1, 2, 3, 7, 50, 90]).map(lambda n: 12 * n)
    of_adapters = st.sampled_from([torch.float32, torch.bfloat16] + [torch.float64] * (dtype == torch.float64))
    grids, sizes = st.sampled_from([1, 2, 3, 4]), st.sampled_from([1e-3, 0.3, 3.0])
    adapters = st.lists(
        st.tuples(grids, st.integers(1, 3), st.integers(0, 2), sizes, of_adapters), min_size=1, max_size=3
    )
    layout, seed = draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 1000))
    return Problem(draw(width), draw(width), dtype, layout, draw(st.booleans()), draw(adapters), seed)


@given(problem=problems())
@settings(max_examples=150)
def test_a_merge_has_the_bits_of_one_after_the_other_and_is_taken_off_bit_for_bit(problem: Problem) -> None:
    weight, adapters, fan = problem.made()
    before, expected = weight.clone(), problem.made()[0]
    merge_one_after_the_other(expected, adapters, fan)  # in the same strides, which decide how sums are made
    kept = Kept(weight, adapters, fan)
    kept.merge(weight, weight)
    assert kept.facts[DONE] and same_bits(weight, expected)
    assert kept.obstacle(weight) is None
    assert kept.take_off(weight) is None
    assert same_bits(weight, before)
    kept.put_on(weight)
    assert same_bits(weight, expected)
    kept.roll_back(weight)
    assert same_bits(weight, before)


@given(problem=problems())
@settings(max_examples=100)
def test_codes_and_checksums_are_those_of_plain_torch(problem: Problem) -> None:
    weight, adapters, fan = problem.made()
    weight = weight.contiguous()
    kept, to = Kept(weight, adapters, fan), torch.empty_like(weight)
    kept.merge(weight, to)
    plain, merged = in_chunks(weight, adapters, fan)
    assert (kept.codes is None) == (not plain.facts[DONE])
    if kept.codes is None:
        assert same_bits(merged, weight)
        return
    assert same_bits(to, merged)
    assert torch.equal(kept.codes, plain.codes.flatten())
    assert torch.equal(kept.facts, plain.facts)
    order = kept.places.argsort()
    assert torch.equal(kept.places[order], plain.places) and same_bits(kept.values[order], plain.values)
    assert chunked.checksums(weight)[0] == kept.facts[BEFORE] and chunked.checksums(to)[1] == kept.facts[AFTER]
    chunked.take_off(plain, merged)
    assert same_bits(merged, weight)


def of_all_kinds(dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """All numbers of 16 bits, or as many bit patterns of more, over and over."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.arange(2**16).to(torch.int64) << 8 * dtype.itemsize - 16
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 2**16, (2**16,), generator=generator) if dtype.itemsize > 2 else 0
    return (
        (bits + low)
        .to(integer)
        .repeat(-(-shape[0] * shape[1] // 2**16))[: shape[0] * shape[1]]
        .view(dtype)
        .view(shape)
        .clone()
    )


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-3, 1.0, 1e5, 3e38], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_numbers_of_all_kinds_come_back(dtype: torch.dtype, size: float) -> None:
    """Zeros of both signs, subnormals, infinities and NaNs, and sums that overflow."""
    weight = of_all_kinds(dtype, (512, 300))
    before, adapters = weight.clone(), [adapter(300, 512, 2, 2, 1, 0, size), adapter(300, 512, 4, 1, 0, 1, size)]
    kept = Kept(weight, adapters, False)
    kept.merge(weight, weight)
    assert same_bits(weight, merge_one_after_the_other(before.clone(), adapters, False))
    assert kept.take_off(weight) is None
    assert same_bits(weight, before)


def test_zeros_need_no_place_in_the_list() -> None:
    """A pruned model is mostly zeros, each far from V in units of the last place."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    weight[:, ::2] = 0
    kept = Kept(weight, [adapter(512, 256, 2, 4, 0, 0, 0.1)], False)
    before = weight.clone()
    kept.merge(weight, weight)
    assert (
        kept.codes is not None and (kept.codes == 127).sum() == 256 * 256 and len(kept.places) < 0.01 * weight.numel()
    )
    kept.take_off(weight)
    assert same_bits(weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_where_the_list_has_no_room_the_weight_is_as_it_was(dtype: torch.dtype) -> None:
    """Only its last rows have codes that do not fit, so that all others were merged."""
    weight = torch.randn(600, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[580:] *= 1e-4
    before, o = weight.clone(), adapter(512, 600, 2, 4, 0, 0, 1.0)
    room = capacity(weight)
    assert room < 20 * 512
    codes, places = torch.empty(weight.numel(), dtype=torch.int8), torch.empty(room, dtype=torch.int32)
    values, facts = torch.empty(room, dtype=dtype), torch.zeros(5, dtype=torch.int64)
    native.merge_coded(weight, weight, list(o[1:5]), [o.scaling], False, codes, places, values, facts)
    assert facts[LISTED] == -1 and not facts[DONE] and same_bits(weight, before)
    kept = Kept(weight, [o], False)
    kept.merge(weight, weight)
    assert kept.facts[DONE] and same_bits(kept.copy, before)
    plain, to = in_chunks(before, [o], False)
    assert not plain.facts[DONE] and same_bits(to, before)


def test_the_first_adapter_that_breaks_the_weight_is_told() -> None:
    adapters = [adapter(64, 128, 2, 2, 0, seed) for seed in range(4)]
    adapters[2].A[0, 3, 1] = float("inf")
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    kept, to = Kept(weight, adapters, False), torch.empty_like(weight)
    kept.merge(weight, to)
    assert kept.facts[FIRST_NOT_FINITE] == 2
    fine = Kept(weight, adapters[:2], False)
    fine.merge(weight, to)
    assert fine.facts[FIRST_NOT_FINITE] == 2


class Broken(Exception):
    """What breaks work on rows off here."""


@pytest.mark.parametrize("again", range(1, 9))
@pytest.mark.parametrize("what", ["merge", "take_off", "roll_back"])
@pytest.mark.parametrize("at", [*range(1, 12), 16, 21])
def test_work_between_chunks_that_breaks_and_whose_undoing_breaks_is_undone_at_last(
    what: str, at: int, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work breaks at its step ``at``, the undoing at its step ``again``; the undoing is called until it ends."""
    weight, o = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)), adapter(24, 50, 2, 2, 1, 0, 0.01)
    monkeypatch.setattr(chunked, "ELEMENTS", 24 * 7)
    monkeypatch.setattr(exact, "_has_kernel", lambda weight: False)
    right, left = chunked._add_to_rows, 0

    def breaks(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Broken
        right(*arguments)

    monkeypatch.setattr(chunked, "_add_to_rows", breaks)
    kept, now = Kept(weight, [o], False), weight.clone()
    if what != "merge":
        kept.merge(now, now)
    expected = now.clone() if what == "take_off" else weight
    work, undo = {
        "merge": (partial(kept.merge, now), kept.roll_back),
        "take_off": (kept.take_off, kept.put_on),
        "roll_back": (kept.roll_back, kept.roll_back),
    }[what]
    for left, call in (  # noqa: B007  `breaks` counts it down
        (at, work),
        (again, undo),
        (0, undo),
        (0, undo),
    ):
        with suppress(Broken):
            call(now)
    assert kept.pending is None and same_bits(now, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"codes": torch.empty(3, dtype=torch.int8)},
            ValueError,
            r"codes must be contiguous \[12\] of Char on the CPU, but is \[3\] of Char",
        ),
        (
            {"values": torch.empty(1, dtype=torch.float64)},
            ValueError,
            r"values must be contiguous \[\d+\] of Float on the CPU, but is \[1\] of Double",
        ),
        ({"facts": torch.zeros(3, dtype=torch.int64)}, ValueError, r"facts must be contiguous \[5\] of Long"),
        ({"scalings": []}, ValueError, "one scaling for four, but are 4 tensors and 0 scalings"),
        ({"to": torch.zeros(3, 4).t().contiguous().t()}, ValueError, "to must be like weight"),
        ({"adapters": [None, torch.zeros(1, 1, 3), None, None]}, TypeError, "A and B must be tensors, but one is None"),
        (
            {"adapters": [torch.zeros(1, 4, 1).double(), torch.zeros(1, 1, 3).double(), None, None]},
            TypeError,
            "A must not be float64",
        ),
    ],
)
def test_the_op_refuses_what_does_not_fit(change: dict[str, Any], error: type[Exception], words: str) -> None:
    weight = torch.zeros(3, 4)
    arguments = {
        "weight": weight,
        "to": weight,
        "adapters": [torch.zeros(1, 4, 1), torch.zeros(1, 1, 3), None, None],
        "scalings": [1.0],
        "fan_in_fan_out": False,
        "codes": torch.empty(12, dtype=torch.int8),
        "places": torch.empty(1, dtype=torch.int32),
        "values": torch.empty(1),
        "facts": torch.zeros(5, dtype=torch.int64),
    }
    with pytest.raises(error, match=words):
        native.merge_coded(*{**arguments, **change}.values())
    with pytest.raises(ValueError, match="weight must be a matrix"):
        native.checksums(torch.zeros(3), False)


def test_a_result_that_overlaps_the_weight_without_being_it_is_refused() -> None:
    memory = torch.randn(16 * 8 + 5)
    weight, to = memory[: 16 * 8].view(16, 8), memory[5:].view(16, 8)
    kept, before = Kept(weight, [adapter(8, 16, 2, 1, 0, 0)], False), memory.clone()
    with pytest.raises(ValueError, match="to must not share weight's memory"):
        kept.merge(weight, to)
    assert same_bits(memory, before)
