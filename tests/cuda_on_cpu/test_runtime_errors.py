# SPDX-License-Identifier: Apache-2.0
"""Whose errors CUDA's runtime reports: a launch is judged by its own, and leaves those of others as they are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import compilers
import pytest

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "runtime_errors.cpp"
CLAIMS = re.findall(r'^    \{"(.+)",$', SOURCE.read_text(), re.MULTILINE)

pytestmark = [
    pytest.mark.skipif(compilers.find_toolkit() is None, reason="there are no CUDA headers"),
    pytest.mark.skipif(compilers.compiler() is None, reason="there is no C++ compiler"),
]

LAUNCH = "cudaLaunchKernel(symbol, grid, block, pointers, dynamic_bytes, stream)"
FORGET = "if (error != cudaSuccess && before == cudaSuccess) cudaGetLastError();"
# What is replaced in runtime.h by what, and a claim that then does not hold.
DEFECTS = {
    "a launch is judged by the last error": (
        f"return error == cudaSuccess ? {LAUNCH} : error;",
        f"if (error == cudaSuccess) {LAUNCH}; return cudaGetLastError();",
        "an earlier error is not the launch's",
    ),
    "errors of others are forgotten": (
        FORGET,
        "cudaGetLastError();",
        "an earlier error is left for whoever it belongs to",
    ),
    "our own errors are left": (FORGET, "(void)before;", "an error of the launch is not left for others"),
    "an error that was there before is forgotten with ours": (
        FORGET,
        "if (error != cudaSuccess) cudaGetLastError();",
        "an error of the launch is its own beside an earlier one",
    ),
    "shared memory is not asked for where it must be": (
        "dynamic_bytes > kWithoutAsking",
        "dynamic_bytes > 2 * kWithoutAsking",
        "much shared memory is asked for before the launch",
    ),
    "a launch without the shared memory that it asked for": (
        f"error == cudaSuccess ? {LAUNCH} : error",
        LAUNCH,
        "without its shared memory a kernel is not launched",
    ),
}


def holds(claim: str, kernels: Path = compilers.KERNELS) -> bool:
    program = compilers.emulated_program([SOURCE], "plain", kernels=kernels)
    code = subprocess.run([program, claim], check=False).returncode
    assert code in (0, 1), f"{claim}: {code}"
    return code == 0


def test_there_are_claims() -> None:
    assert len(CLAIMS) > 10


@pytest.mark.parametrize("claim", CLAIMS)
def test_errors_are_whose_they_are(claim: str) -> None:
    assert holds(claim)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_seen(defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, claim = DEFECTS[defect]
    for name in ("runtime.h", "device.h"):
        (tmp_path / name).write_text((compilers.KERNELS / name).read_text())
    text = (tmp_path / "runtime.h").read_text()
    assert text.count(old) == 1
    (tmp_path / "runtime.h").write_text(text.replace(old, new))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not holds(claim, tmp_path)
