# SPDX-License-Identifier: Apache-2.0
"""The self-test: it passes here, and it says so where a result or an instruction is wrong."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gralora_ext import ops, selftest
from gralora_ext._loader import load
from gralora_ext.cli import main
from gralora_ext.selftest import instructions, passes
from gralora_ext.tuner.exact import Kept

CPU = torch.device("cpu")


def test_every_case_is_tried_and_the_cpu_is_trustworthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--selftest"]) == 0
    printed = capsys.readouterr()
    (sentence,) = (line for line in printed.out.splitlines() if "the CPU is" in line)
    worst = re.search(r"trustworthy: 449 results agree with the reference, at worst with (\d+)% of", sentence)
    assert 1 <= int(worst[1]) < 100
    assert len(passes.cases()) == 25


def test_each_case_is_said_before_it_is_tried(two_cases: None) -> None:
    steps: list[str] = []
    assert selftest.run(CPU, steps.append).results == 52 and len(steps) == 2


@pytest.fixture
def two_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of all, which take ten seconds."""
    all_cases = passes.cases()
    monkeypatch.setattr(selftest, "cases", lambda: all_cases[:2])


def test_what_is_missing_does_not_keep_it_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gralora_ext.cli.info.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("gralora_ext.selftest.devices", list)
    assert main(["info", "--selftest"]) == 0


def test_a_wrong_result_is_told(
    two_cases: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.merge_

    def merge_(weight: Tensor, *tensors: Tensor, scaling: float, **general: Tensor) -> Tensor:
        return right(weight, *tensors, scaling=2 * scaling, **general)

    monkeypatch.setattr(ops, "merge_", merge_)
    assert main(["info", "--selftest"]) == 1
    printed = capsys.readouterr().out
    assert "the CPU is NOT trustworthy: 2 of 52 results are wrong." in printed
    assert "- merge T=257 576x1536 r=16 k=2 float32+float32: " in printed


def test_a_result_that_is_no_number_is_wrong(two_cases: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.merge_
    monkeypatch.setattr(ops, "merge_", lambda *args, **kwargs: right(*args, **kwargs) * float("nan"))
    assert len(selftest.run(CPU).wrong) == 2


def test_one_wrong_element_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hardly counts in norm."""
    right = ops.gralora

    def gralora(*args: Tensor, **kwargs: Any) -> Tensor:
        y = right(*args, **kwargs)
        return y + torch.nn.functional.pad(y.new_ones(1), (y.numel() - 1, 0)).view_as(y)

    case = next(case for case in passes.cases() if case.activations == torch.bfloat16 and case.T > 100)
    monkeypatch.setattr(ops, "gralora", gralora)
    what, share = next(passes.check(case, CPU))
    assert what.startswith("forward") and share > 1


def test_a_merge_that_is_not_taken_off_bit_for_bit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Kept.take_off

    def take_off(kept: Kept, weight: Tensor) -> str | None:
        reason = right(kept, weight)
        weight.view(-1)[3] = weight.view(-1)[3].nextafter(torch.zeros((), dtype=weight.dtype))
        return reason

    monkeypatch.setattr(Kept, "take_off", take_off)
    case = passes.cases()[1]
    assert [what.split(" T=")[0] for what, share in passes.check(case, CPU) if share > 1] == ["unmerge by codes"]


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_the_cases_are_carried_out_in_each_way_that_there_is(threads: int) -> None:
    """Of sharing forward and backward among threads, over layers and tokens of all sizes."""

    def ways(case: passes.Case) -> set[tuple[Any, ...]]:
        sizes = {name: getattr(case, name) for name in ("T", "N", "M", "k", "r", "h", "dropout")}
        dtypes = {"activations": str(case.activations)[6:], "parameters": str(case.adapter)[6:]}
        plans = load().explain({**sizes, **dtypes, "threads": threads})
        return {(name, plans[name]["schedule"], plans[name]["whole_blocks"]) for name in ("forward", "backward")}

    there_are = set[tuple[Any, ...]]()
    for T, width, k, r in product((1, 3, 5, 16, 64, 256, 2048), (64, 768, 2048, 4096), (1, 2, 4, 8), (8, 16, 64)):
        there_are |= ways(passes.Case(T, width, width, k, r, 0, torch.float32, torch.float32))
    assert there_are <= {way for case in passes.cases() for way in ways(case)}


@pytest.mark.parametrize("name", instructions.CASES)
def test_a_wrong_instruction_is_seen(name: str) -> None:
    """The expected values pass their own check, and not where one bit differs."""
    case = instructions.CASES[name]()
    outputs = [expected.copy() for expected in case.expected]
    arrays = [*case.arrays[: len(case.arrays) - len(outputs)], *outputs]
    case.check(arrays)
    for output in outputs:
        before = output.copy()
        output.reshape(-1).view(np.uint8)[-2] ^= 0x40
        with pytest.raises(AssertionError):
            case.check(arrays)
        output[...] = before
