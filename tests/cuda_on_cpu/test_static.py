# SPDX-License-Identifier: Apache-2.0
"""What nvcc and ptxas say of the kernels for real devices: no warning, no spill, no local memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import compilers
import pytest

from gralora_ext import _build_config as config
from gralora_ext.selftest.instructions import CASES

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
PASSES = ("bfloat16.cu", "float16.cu", "float32.cu", "launch.cu")
toolkit = compilers.find_toolkit()
needs_nvcc = pytest.mark.skipif(toolkit is None or toolkit.nvcc is None, reason="there is no nvcc")


@needs_nvcc
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


@needs_nvcc
def test_kernels_on_tensor_cores_are_never_compiled_into_nothing() -> None:
    """For a device that lacks the instructions they are refused: PTX of 7.5 cannot hold them without a body."""
    with pytest.raises(compilers.CompileError, match='"mma_m16n8k16" is undefined'):
        compilers.ptx(CSRC / "cuda" / "bfloat16.cu", 75, include=[CSRC])


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "held"), [("launch.cu", [("elf", "75"), ("ptx", "75")]), ("bfloat16.cu", [("ptx", "80")])]
)
def test_a_build_for_7_5_and_ptx_holds_code_for_every_later_card(source: str, held: list[tuple[str, str]]) -> None:
    line = config.cuda.command(f"csrc/cuda/{source}", ["7.5+PTX"], config.cuda.find_toolkit(), CSRC, ["c++"])
    command = [*line, "--dryrun", "-c", str(CSRC / "cuda" / source)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert sorted(re.findall(r"--image3?=kind=(\w+),sm=(\d+)", said)) == held


def test_all_sources_are_compiled() -> None:
    included = re.findall(r'#include "(\w+\.cu)"', (HERE / "kernels.cu").read_text())
    assert sorted(included) == sorted(PASSES)
    others = {path.name for path in (CSRC / "cuda").glob("*.cu")} - set(PASSES)
    assert others == {"conformance.cu"}  # of test_conformance.py


def intrinsics_in(paths: Iterable[Path]) -> set[str]:
    """Those of csrc/cuda/intrinsics_device.cuh for device code, synchronisation apart"""
    text = (CSRC / "cuda" / "intrinsics_device.cuh").read_text()
    declared = set(re.findall(r"__device__ __forceinline__ [\w:]+\*? (\w+)\(", text)) - {"shared_address"}
    assert len(declared) > 8
    used = {name for path in paths for name in re.findall(r"\b\w+(?=[<(])", path.read_text())}
    return {name for name in declared & used if not name.startswith("sync_")}


def test_the_self_test_tries_the_instructions_that_kernels_use() -> None:
    conformance = CSRC / "cuda" / "conformance.cu"
    kernels = [
        path for path in (CSRC / "cuda").glob("*.cu*") if not path.name.startswith(("intrinsics", "conformance"))
    ]
    assert intrinsics_in([conformance]) == intrinsics_in(kernels)
    assert re.findall(r"^  GRALORA_RUN\((\w+)\)", conformance.read_text(), re.MULTILINE) == list(CASES)
    of_cuda = re.compile(
        r"\basm\b|\b__(?:shfl|ballot|any|all|match|reduce|activemask|threadfence|syncwarp|syncthreads)\w*"
    )
    assert {path.name: of_cuda.findall(path.read_text()) for path in kernels} == {path.name: [] for path in kernels}


def test_kernels_hold_no_atomics() -> None:
    """Sums would depend on the order in which blocks run."""
    sources = sorted((CSRC / "cuda").glob("*.cuh"))
    assert len(sources) > 5
    assert [path.name for path in sources if "atomic" in path.read_text().replace("no atomics", "")] == []
