# SPDX-License-Identifier: Apache-2.0
"""The machine code of each kernel: tensor cores and wide accesses where they belong, no local memory, no atomics."""

from __future__ import annotations

import re
from pathlib import Path

import compilers
import pytest
from devices import DEVICES
from resources import short_names
from sass import KERNELS_WITH, disassembler, objections, opcodes

HERE = Path(__file__).resolve().parent
toolkit = compilers.find_toolkit()
pytestmark = [
    pytest.mark.skipif(toolkit is None or toolkit.nvcc is None, reason="there is no nvcc"),
    pytest.mark.skipif(disassembler() is None, reason="there is no nvdisasm"),
    pytest.mark.parametrize("arch", [device.capability for device in DEVICES.values()]),
]


def test_kernels_hold_what_they_are_written_with(arch: int) -> None:
    counts = opcodes(compilers.kernels_cubin(arch).path)
    names = short_names(sorted(counts))
    for start, _, _ in KERNELS_WITH:
        assert sum(re.match(start, name) is not None for name in names.values()) >= 3
    wrong = {names[symbol]: objections(names[symbol], count) for symbol, count in counts.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    ("kernel", "name", "expected"),
    [
        ("local_memory", "reduce<fp32>", {"local memory"}),
        ("adds_in_any_order", "reduce<fp32>", {"atomics"}),
        ("single_floats", "reduce<fp32>", set()),
        ("single_floats", "expand<Ranks, bf16, fp32, 32>", {f"no {what}" for _, _, what in KERNELS_WITH}),
    ],
)
def test_what_is_wrong_is_seen(kernel: str, name: str, expected: set[str], arch: int) -> None:
    """Small kernels that pass for another by its name"""
    counts = opcodes(compilers.cubin(HERE / "sass_defects.cu", arch, strict=False).path)[kernel]
    assert sum(counts.values()) > 5
    assert {text.split(": ")[-1] for text in objections(name, counts)} == expected
