# SPDX-License-Identifier: Apache-2.0
"""Each intrinsic three ways: on the emulator, as PTX that nvcc made, and computed from the PTX ISA's figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import compilers
import numpy as np
import pytest
from emulated import COPIES, Library
from ptx import Gpu

from gralora_ext.selftest.instructions import CASES, LANES, Launch, ldmatrix, mma_bf16, wrong_ones

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


@pytest.fixture(params=compilers.ARCHS)
def tensor_cores(request: pytest.FixtureRequest, library: Library) -> Iterator[Library]:
    """Adds as the tensor cores of an architecture do."""
    library.configure()
    library.device(request.param)
    library.truncate(True)
    yield library
    library.truncate(False)
    library.device()


def launcher(library: Library) -> Launch:
    def launch(name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
        there = [aligned(array) for array in arrays]
        library.launch(f"launch_{name}", *there)
        return there

    return launch


def test_tensor_cores_pass_the_self_test(tensor_cores):
    assert wrong_ones(launcher(tensor_cores)) == []


def test_no_tensor_core_has_anything_to_cut_in_the_self_test():
    """Terms and sums, those of a part of the terms too, are multiples of 2^-18 below 2^6."""
    case = mma_bf16()
    a, b, c = case.arrays
    a, b = ((bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32) for bits in (a, b))
    assert 16 * abs(a).max() * abs(b).max() + abs(c).max() < 2**6
    for values, step in ((a, 2**-6), (b, 2**-6), (c, 2**-18), (case.expected[0], 2**-18)):
        assert (values % step == 0).all()
    assert (case.expected[0] % 2**-17 != 0).any() and abs(case.expected[0]).max() >= 2**4  # 23 bits are used


def swapped(registers: np.ndarray, order: list[int]) -> np.ndarray:
    return np.ascontiguousarray(registers[:, order])


def with_one_bit_flipped(bits: np.ndarray) -> np.ndarray:
    flipped = bits.copy()
    flipped.view(np.uint32)[5, 1] ^= 1
    return flipped


# What a, b, c or d is in place of what it should be
WRONG: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "upper and lower rows of A swapped": (0, lambda a: swapped(a, [1, 0, 3, 2])),
    "halves of the rows of A swapped": (0, lambda a: swapped(a, [2, 3, 0, 1])),
    "elements of a register of A swapped": (0, lambda a: swapped(a.view(np.uint16), [1, 0, 3, 2, 5, 4, 7, 6])),
    "one bit of one element of A": (0, with_one_bit_flipped),
    "halves of the columns of B swapped": (1, lambda b: swapped(b, [1, 0])),
    "lanes of B in another order": (1, lambda b: b.reshape(8, 4, 2).transpose(1, 0, 2).reshape(32, 2).copy()),
    "one bit of one element of B": (1, with_one_bit_flipped),
    "the accumulator is not added": (2, np.zeros_like),
    "one step of one element of the accumulator": (
        2,
        lambda c: c + np.float32(2**-18) * (np.arange(128) == 77).reshape(32, 4),
    ),
    "the accumulator has the 11 bits of a tf32": (
        2,
        lambda c: (c.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32),
    ),
    "neighbours in a row of D swapped": (3, lambda d: swapped(d, [1, 0, 3, 2])),
}


@pytest.mark.parametrize("defect", WRONG)
def test_a_wrong_mma_fails_the_self_test(tensor_cores, defect):
    place, change = WRONG[defect]
    right = launcher(tensor_cores)

    def wrong(name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
        if name != "mma_bf16":
            return right(name, arrays)
        arrays = [change(array) if i == place else array for i, array in enumerate(arrays)]
        a, b, d = right(name, arrays)
        return [a, b, change(d) if place == 3 else d]

    assert wrong_ones(wrong) == ["mma_bf16"]


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
