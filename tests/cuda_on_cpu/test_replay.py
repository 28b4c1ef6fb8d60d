# SPDX-License-Identifier: Apache-2.0
"""The PTX that nvcc makes of whole kernels, interpreted launch by launch as the emulator ran them: the same results, bit for bit.

Both add an mma's products in double, which is exact here, and round once. The tensor-core kernels have no sum that nvcc could
contract with a product (a test says so); the plain ones have, and are compiled without for the comparison.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import compilers
import numpy as np
import pytest
from calls import ELEMENT, PASSES, Call, Shape, arrays_of, run
from emulated import Library
from ptx import Gpu
from traffic import library_of_kernels

toolkit = compilers.find_toolkit()
pytestmark = [
    pytest.mark.skipif(toolkit is None or toolkit.nvcc is None, reason="there is no nvcc"),
    pytest.mark.skipif(compilers.compiler() is None, reason="there is no g++"),
]
SOURCES = {"bf16": "bfloat16.cu", "fp16": "float16.cu", "fp32": "float32.cu"}
INPUTS = ("x", "base", "grad_y", "u", "A", "B", "A_general", "B_general", "weight")
NO_TENSOR_CORES = (75, 40)

# Ragged tiles of tokens, columns and ranks with dropout and a general part; whole vectors in
# several parts of columns and tokens; one tile of tokens with more than 64 ranks, whose U is made
# again; the other dtypes.
SHAPES = [
    Shape(131, 144, 176, 2, 12, h=5, dropout=0.3, columns=1, tokens=2),
    Shape(129, 256, 128, 2, 32, columns=2, tokens=3),
    Shape(3, 90, 78, 1, 70, keep_u=False, columns=1, tokens=1),
    Shape(70, 80, 66, 2, 20, dropout=0.5, adapter="bf16", columns=1, tokens=1),
    Shape(33, 72, 40, 1, 9, h=2, dropout=0.5, dtype="fp32", columns=2, tokens=1),
    Shape(33, 72, 40, 1, 9, dtype="fp16", columns=1, tokens=1),
]


@pytest.fixture(scope="module")
def library() -> Library:
    library = library_of_kernels()
    library.device()
    library.configure()
    return library


@functools.cache
def gpu(*sources: str, arch: int = 80, flags: tuple[str, ...] = ()) -> Gpu:
    return Gpu(*(ptx(source, arch, flags) for source in sources))


def ptx(source: str, arch: int = 80, flags: tuple[str, ...] = ()) -> str:
    return compilers.ptx(compilers.KERNELS / source, arch, include=[compilers.KERNELS.parent], flags=flags)


def name(shape: Shape) -> str:
    return f"{shape.dtype}_{shape.adapter}_{shape.T}x{shape.N}x{shape.M}"


def fill(shape: Shape, arrays: dict[str, np.ndarray]) -> None:
    """Inputs with normal numbers; what is to be written with NaN."""
    generator = np.random.default_rng(shape.T)
    for name, array in arrays.items():
        if name not in INPUTS:
            array[:] = 0xFF
            continue
        dtype = "fp32" if name == "u" else shape.adapter if name[0] in "AB" else shape.dtype
        values = generator.standard_normal(array.size // ELEMENT[dtype]).astype(np.float32)
        if dtype == "bf16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        array[:] = (values.astype(np.float16) if dtype == "fp16" else values).view(np.uint8)


def differing(library: Library, shape: Shape, which: str, on: Gpu, seed: int | None = None) -> list[str]:
    """The arrays in which a pass of ``shape`` leaves other bits in the interpreter; with another seed there, if one is given."""
    emulated = arrays_of(library, shape, which)
    fill(shape, emulated)
    interpreted = {name: array.copy() for name, array in emulated.items()}
    call = run(library, shape, which, emulated)
    arguments = call.copy()
    if seed is not None:
        arguments.view(np.int64)[Call.seed.offset // 8] = seed
    on.clear()
    for name, array in interpreted.items():
        on.upload(array, emulated[name].ctypes.data)
    on.upload(arguments, call.ctypes.data)
    for launch in library.launched():
        on.launch(launch.symbol, launch.grid, launch.block, launch.arguments, dynamic_bytes=launch.dynamic_bytes)
    return [name for name, array in emulated.items() if (array != interpreted[name]).any()]


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_the_ptx_computes_the_emulators_bits(shape: Shape, which: str, library: Library) -> None:
    assert differing(library, shape, which, gpu(*sorted({SOURCES[shape.dtype], SOURCES[shape.adapter]}))) == []


@pytest.mark.parametrize("arch", [75, 80])
@pytest.mark.parametrize("which", PASSES)
def test_the_ptx_of_the_plain_kernels_computes_the_emulators_bits(which: str, arch: int, library: Library) -> None:
    library.device(*NO_TENSOR_CORES)
    shape = Shape(37, 24, 70, 2, 6, h=3, dropout=0.3)
    assert differing(library, shape, which, gpu("launch.cu", arch=arch, flags=("-fmad=false",))) == []
    library.device()


def test_other_bits_are_seen(library: Library) -> None:
    """A seed of which the emulator knew nothing drops other elements."""
    shape = replace(SHAPES[0], T=8)
    assert differing(library, shape, "forward", gpu("bfloat16.cu")) == []
    assert differing(library, shape, "forward", gpu("bfloat16.cu"), seed=5) == ["y", "u", "workspace"]


@pytest.mark.parametrize("source", SOURCES.values())
def test_there_is_nothing_to_contract(source: str) -> None:
    assert re.findall(r"\bfma\.\S+", ptx(source)) == []
