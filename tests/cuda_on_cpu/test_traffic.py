# SPDX-License-Identifier: Apache-2.0
"""The bytes that the kernels move: counted on the emulator, by the formula of ``work.py``, and in its committed table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from calls import ELEMENT, PASSES, Shape
from compilers import compiler, find_toolkit
from devices import DEVICES, Device
from emulated import Library
from traffic import MAIN, TABLE, by_kind, differences, floor, library_of_kernels, table, work_of
from work import READ, Plan

pytestmark = pytest.mark.skipif(find_toolkit() is None or compiler() is None, reason="needs CUDA's headers and g++")

# Each kernel in each of its ways: whole and ragged tiles of tokens, columns and ranks; 16, 32, 64
# and more ranks; more than 8 tiles of columns; one token; parts of columns and tokens; no vectors.
SMALL = [
    Shape(256, 512, 768, 2, 32),
    Shape(131, 144, 176, 2, 12, h=5, dropout=0.3, add_to_dx=True),
    Shape(1, 1280, 1152, 2, 32),
    Shape(300, 200, 72, 1, 40, adapter="bf16"),
    Shape(100, 264, 1160, 2, 80, h=3, dropout=0.2, keep_u=False),
    Shape(140, 96, 1200, 1, 130, h=66, columns=1, tokens=1),
    Shape(129, 600, 120, 3, 24, h=4, columns=3, tokens=2, keep_u=False),
    Shape(257, 130, 66, 2, 16, dtype="fp32", dropout=0.5),
    Shape(65, 90, 99, 3, 18, h=2, dtype="fp16", padding=3),
    Shape(64, 140, 132, 2, 140, dtype="fp16", adapter="fp16", keep_u=False),
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


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", SMALL, ids=lambda s: f"{s.T}x{s.N}x{s.M}")
def test_what_is_read_again_is_all_but_the_whole_buffer(shape: Shape, which: str) -> None:
    sizes = replace(shape, padding=0).sizes(which)
    for launch, work in Plan(shape, 3, 2).work(which).items():
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


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_frozen_layers_backward_saves_what_autograds_addition_moves(device: Device, library: Library) -> None:
    """Where the path's dx is added to the layer's, and is not a tensor of its own that autograd adds: two read, one written."""
    library.device(device.capability, device.multiprocessors)
    apart, together = (
        by_kind(work_of(library, replace(MAIN, add_to_dx=adds), "backward"))["activations"] for adds in (False, True)
    )
    addition = 3 * MAIN.T * MAIN.N * ELEMENT[MAIN.dtype]
    assert together <= 0.75 * (apart + addition)


def test_the_committed_table_is_the_formulas(library: Library) -> None:
    tables = [table(library, whole=whole) for whole in (False, True)]
    assert TABLE.read_text("utf-8") in tables, "`python tests/cuda_on_cpu/traffic.py` rewrites the table"
