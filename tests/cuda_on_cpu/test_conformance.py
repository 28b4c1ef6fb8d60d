# SPDX-License-Identifier: Apache-2.0
"""Each intrinsic three ways: on the emulator, as PTX that nvcc made, and computed from the PTX ISA's figures."""

from __future__ import annotations

from pathlib import Path

import compilers
import numpy as np
import pytest
from emulated import COPIES, Library
from ptx import Gpu

from gralora_ext.selftest.instructions import CASES, LANES, ldmatrix

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
SOURCE = CSRC / "cuda" / "conformance.cu"

toolkit = compilers.find_toolkit()
pytestmark = [
    pytest.mark.skipif(toolkit is None, reason="there are no CUDA headers"),
    pytest.mark.skipif(compilers.compiler() is None, reason="there is no C++ compiler"),
]
needs_nvcc = pytest.mark.skipif(toolkit is not None and toolkit.nvcc is None, reason="there is no nvcc")


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 16 bytes, as a kernel's wide accesses need it."""
    room = np.empty(array.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(compilers.emulated_library(SOURCE, include=[CSRC]))


@pytest.fixture(scope="module", params=[80, 90])
def ptx_text(request: pytest.FixtureRequest) -> str:
    return compilers.ptx(SOURCE, request.param, include=[CSRC])


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("name", CASES)
def test_the_emulator_agrees_with_the_isa(library, name, copies):
    library.configure("random", 1, copies)
    case = CASES[name]()
    arrays = [aligned(array) for array in case.arrays]
    library.launch(f"launch_{name}", *arrays)
    case.check(arrays)


@needs_nvcc
@pytest.mark.parametrize("name", CASES)
def test_the_ptx_agrees_with_the_isa(ptx_text, name):
    case = CASES[name]()
    gpu = Gpu(ptx_text)
    arrays = [array.copy() for array in case.arrays]
    gpu.launch(name, (1,), (32,), [gpu.upload(array) for array in arrays], dynamic_bytes=32 * 16)
    case.check(arrays)


def test_rows_of_one_bank_group_cost_wavefronts(library):
    library.clear()
    case = ldmatrix(False)
    arrays = [aligned(array) for array in case.arrays]
    arrays[1][:] = LANES
    library.launch("launch_ldmatrix", *arrays)
    assert library.statistics()[:2] == (4, 4)
    arrays[1][:] = LANES // 8 + LANES % 4 * 8  # each matrix: four rows, twice, all in the same eighth of the banks
    library.launch("launch_ldmatrix", *arrays)
    assert library.statistics()[:2] == (4 + 4 * 8, 8)
