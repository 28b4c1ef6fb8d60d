# SPDX-License-Identifier: Apache-2.0
"""The extension with its CUDA kernels, built on a machine with nvcc: neither a GPU nor a CUDA build of torch is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import build_helpers as helpers
import pytest

from gralora_ext import _build_config as config

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(config.cuda.find_toolkit() is None, reason="there is no CUDA toolkit"),
]
# Without tensor cores for bfloat16, and with them; PTX for later cards
ARCHS = ["7.5", "9.0+PTX"]
REGISTERED = """
import torch
import gralora_ext.ops
for name in ("gralora", "gralora_", "gralora_backward", "merge_", "delta_weight"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gralora_ext::{name}", "CUDA"), name
"""
ON_CUDA = """
import torch
import gralora_ext.ops
torch.empty(2, device="cuda")
"""


@pytest.fixture(scope="module")
def env() -> dict[str, str]:
    return helpers.environment(GRALORA_EXT_CUDA="1", CUDA_HOME=str(config.cuda.find_toolkit()))


@pytest.fixture(scope="module")
def python(tree: Path, builds: Path, env: dict[str, str]) -> Path:
    """An environment's Python with the extension installed, for each kind of device.

    tests/cuda_on_cpu compiles the kernels for all that nvcc 13 and we know of; test_build_cuda.py says that those are the default.
    """
    python = helpers.make_environment(builds / "cuda_environment")
    env = {**env, "TORCH_CUDA_ARCH_LIST": " ".join(ARCHS)}
    helpers.pip(python, "install", "--ignore-installed", tree, env=env, cwd=builds)
    return python


@pytest.fixture(scope="module")
def installed(python: Path, builds: Path) -> dict[str, Any]:
    return helpers.probe(python, env=helpers.environment(), cwd=builds)


def test_the_installed_extension_holds_kernels_for_the_devices(installed: dict[str, Any]) -> None:
    assert installed["info"]["cuda_archs"] == ARCHS
    headers = subprocess.run(["objdump", "-h", installed["info"]["path"]], capture_output=True, text=True, check=True)
    assert ".nv_fatbin" in headers.stdout


def test_it_needs_no_cuda_library(installed: dict[str, Any]) -> None:
    """torch brings CUDA's runtime where it has one; where it has none, the extension holds its own."""
    headers = subprocess.run(["objdump", "-p", installed["info"]["path"]], capture_output=True, text=True, check=True)
    assert "NEEDED" in headers.stdout and "libcuda.so" not in headers.stdout
    import torch

    assert ("libcudart" in headers.stdout) == bool(torch.version.cuda)


def test_on_the_cpu_it_computes_as_ever(installed: dict[str, Any]) -> None:
    assert installed["info"]["problem"] is None
    assert installed["error"] < 1e-6


def test_cuda_kernels_are_registered(python: Path, builds: Path) -> None:
    helpers.run(python, "-c", REGISTERED, env=helpers.environment(), cwd=builds)


def test_a_missing_gpu_is_an_error_when_one_is_used(python: Path, builds: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    output = helpers.run(python, "-c", ON_CUDA, env=helpers.environment(), cwd=builds, check=False).stdout
    assert "CUDA" in output.splitlines()[-1]


@pytest.mark.parametrize("build", ["jit", "cmake"])
def test_the_other_builds_hold_the_kernels_too(
    build: str, tree: Path, builds: Path, env: dict[str, str], installed: dict[str, Any]
) -> None:
    env = {**env, "TORCH_CUDA_ARCH_LIST": "9.0"}
    if build == "jit":
        env |= {
            "GRALORA_EXT_JIT": "1",
            "PYTHONPATH": str(tree),
            "TORCH_EXTENSIONS_DIR": str(builds / "torch_extensions"),
        }
    else:
        cmake = ("cmake", "-B", builds / "cmake", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}")
        helpers.run(*cmake, "-DBUILD_TESTING=OFF", env=env, cwd=tree)
        helpers.run("cmake", "--build", builds / "cmake", env=env, cwd=tree)
        helpers.copy_package(builds / "cuda_package")
        helpers.run("cmake", "--install", builds / "cmake", "--prefix", builds / "cuda_package", env=env, cwd=builds)
        env |= {"PYTHONPATH": str(builds / "cuda_package")}
    probed = helpers.probe(env=env, cwd=builds)
    assert probed["info"]["build"] == ("jit" if build == "jit" else "prebuilt")
    assert probed["info"]["cuda_archs"] == ["9.0"]
    assert probed["digest"] == installed["digest"]
