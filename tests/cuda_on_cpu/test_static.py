# SPDX-License-Identifier: Apache-2.0
"""What nvcc and ptxas say of the kernels for real devices: no warning, no spill, no local memory."""

from __future__ import annotations

import re
from pathlib import Path

import compilers
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
PASSES = ("bfloat16.cu", "float16.cu", "float32.cu", "launch.cu")
toolkit = compilers.find_toolkit()


@pytest.mark.skipif(toolkit is None or toolkit.nvcc is None, reason="there is no nvcc")
@pytest.mark.parametrize("arch", [*compilers.ARCHS, 75])
def test_kernels_compile_without_warnings_spills_or_local_memory(arch: int) -> None:
    """A warning is an error. Before 8.0 there are the plain kernels alone."""
    plain = arch < 80
    built = (
        compilers.cubin(CSRC / "cuda" / "launch.cu", arch, include=[CSRC]) if plain else compilers.kernels_cubin(arch)
    )
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.log)
    assert len(frames) >= (2 if plain else 50)
    assert set(frames) == {("0", "0", "0")}


def test_all_sources_are_compiled() -> None:
    included = re.findall(r'#include "(\w+\.cu)"', (HERE / "kernels.cu").read_text())
    assert sorted(included) == sorted(PASSES)
    others = {path.name for path in (CSRC / "cuda").glob("*.cu")} - set(PASSES)
    assert others == {"conformance.cu"}  # of test_conformance.py


def test_kernels_hold_no_atomics() -> None:
    """Sums would depend on the order in which blocks run."""
    sources = sorted((CSRC / "cuda").glob("*.cuh"))
    assert len(sources) > 5
    assert [path.name for path in sources if "atomic" in path.read_text().replace("no atomics", "")] == []
