# SPDX-License-Identifier: Apache-2.0
"""The bytes that the kernels move: counted on the emulator, by the formula of ``work.py``, and in its committed table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from calls import ONE_LAUNCH, PASSES, Shape
from compilers import compiler, find_toolkit
from devices import DEVICES, Device
from emulated import Library
from traffic import MAIN, TABLE, by_kind, differences, floor, library_of_kernels, table, work_of
from work import READ, Plan

pytestmark = pytest.mark.skipif(find_toolkit() is None or compiler() is None, reason="needs CUDA's headers and g++")

# Each kernel in each of its ways: whole and ragged tiles of tokens, columns and ranks; 16, 32, 64 and more ranks; more than
# 8 tiles of columns; one token; parts of columns and tokens; rows without vectors.
SMALL = [
    Shape(256, 512, 768, 2, 32),
    Shape(131, 144, 176, 2, 12, h=5, dropout=0.3),
    Shape(1, 1280, 1152, 2, 32),
    Shape(300, 200, 72, 1, 40, adapter="bf16"),
    Shape(100, 264, 1160, 2, 80, h=3, dropout=0.2, keep_u=False),
    Shape(140, 96, 1200, 1, 130, h=66, columns=1, tokens=1),
    Shape(129, 600, 120, 3, 24, h=4, columns=3, tokens=2, keep_u=False),
    Shape(257, 130, 66, 2, 16, dtype="fp32", dropout=0.5),
    Shape(65, 90, 99, 3, 18, h=2, dtype="fp16", padding=3),
    Shape(64, 140, 132, 2, 140, dtype="fp16", adapter="fp16", keep_u=False),
]
# Forward in one launch, in each of its ways
FUSED = [
    Shape(256, 512, 768, 2, 32),
    Shape(131, 144, 176, 2, 12, h=5, dropout=0.3),
    Shape(300, 200, 72, 1, 32, adapter="bf16", keep_u=False),
    Shape(257, 130, 66, 2, 16, dtype="fp32", dropout=0.5),
    Shape(129, 120, 132, 4, 12, h=4, dtype="fp32"),
    Shape(65, 90, 99, 3, 9, h=2, dtype="fp16", padding=3),
]
LIMITS = {"forward": 1.05, "backward": 1.3, "merge": 1.05}
MOST_LAUNCHES = {"forward": 2, "backward": 4, "merge": 1}


@pytest.fixture(scope="module")
def library() -> Library:
    return library_of_kernels()


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", SMALL, ids=lambda s: f"{s.T}x{s.N}x{s.M}")
def test_the_formula_is_what_is_counted(shape: Shape, which: str, device: Device, library: Library) -> None:
    library.device(device.capability, device.multiprocessors)
    library.configure("fifo")
    assert differences(library, shape, which) == {}


@pytest.mark.parametrize("shape", FUSED, ids=lambda s: f"{s.T}x{s.N}x{s.M}")
def test_the_formula_of_forward_in_one_launch_is_what_is_counted(shape: Shape, library: Library) -> None:
    library.device()
    library.configure("fifo")
    assert differences(library, replace(shape, columns=ONE_LAUNCH, tokens=1), "forward") == {}
    assert library.launches() == ["fused_forward"]


@pytest.mark.parametrize(
    ("shape", "which", "columns"),
    [*((shape, which, 3) for shape in SMALL for which in PASSES), *((shape, "forward", 0) for shape in FUSED)],
    ids=lambda value: f"{value.T}x{value.N}x{value.M}" if isinstance(value, Shape) else str(value),
)
def test_what_is_read_again_is_all_but_the_whole_buffer(shape: Shape, which: str, columns: int) -> None:
    sizes = replace(shape, padding=0).sizes(which)
    for launch, work in Plan(shape, columns, 2).work(which).items():
        for name in ("x", "base", "grad_y", "u", "A", "B", "A_general", "B_general", "weight"):
            first = work.moved[name, READ] - work.again[name]
            assert first in (0, sizes.get(name)), f"{launch}, {name}"
            assert first > 0 or work.moved[name, READ] == 0


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("which", PASSES)
def test_activations_are_read_about_once(which: str, device: Device, library: Library) -> None:
    """What the kernels are built for, at 4096 x 4096 and 8192 tokens; and the adapters, which are read again by every tile of
    tokens, are less than half of it."""
    library.device(device.capability, device.multiprocessors)
    kinds = by_kind(work_of(library, MAIN, which))
    assert floor(MAIN, which) <= kinds["activations"] <= LIMITS[which] * floor(MAIN, which)
    assert 0 < kinds["adapters"] < kinds["activations"] / 2
    assert len(Plan(MAIN, *MAIN.splits(library, which)).work(which)) <= MOST_LAUNCHES[which]


def test_the_committed_table_is_the_formulas(library: Library) -> None:
    tables = [table(library, whole=whole) for whole in (False, True)]
    assert TABLE.read_text("utf-8") in tables, "`python tests/cuda_on_cpu/traffic.py` rewrites the table"
