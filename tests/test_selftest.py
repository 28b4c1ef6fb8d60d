# SPDX-License-Identifier: Apache-2.0
"""The self-test: it passes here, and it says so where a result or an instruction is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gralora_ext import ops, selftest
from gralora_ext.cli import main
from gralora_ext.selftest import instructions

CPU = torch.device("cpu")


def test_the_cpu_is_trustworthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--selftest"]) == 0
    printed = capsys.readouterr().out.splitlines()
    (sentence,) = (line for line in printed if "the CPU is" in line)
    assert "the CPU is trustworthy: 290 results agree with the reference" in sentence


def test_what_is_missing_does_not_keep_it_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gralora_ext.cli.info.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("gralora_ext.selftest.devices", list)
    assert main(["info", "--selftest"]) == 0


def test_every_case_is_tried_and_near_the_reference() -> None:
    steps: list[str] = []
    result = selftest.run(CPU, steps.append)
    assert len(steps) == 19 and result.results == 290 and not result.wrong
    assert 0.01 < result.worst < 1


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ops.merge_

    def merge_(weight: Tensor, *tensors: Tensor, scaling: float, **general: Tensor) -> Tensor:
        return right(weight, *tensors, scaling=2 * scaling, **general)

    monkeypatch.setattr(ops, "merge_", merge_)
    assert main(["info", "--selftest"]) == 1
    printed = capsys.readouterr().out
    assert "the CPU is NOT trustworthy: 19 of 290 results are wrong." in printed
    assert "- merge T=257 576x1536 r=16 k=2 float32+float32: " in printed


def test_a_result_that_is_no_number_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.merge_
    monkeypatch.setattr(ops, "merge_", lambda *args, **kwargs: right(*args, **kwargs) * float("nan"))
    assert len(selftest.run(CPU).wrong) == 19


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
