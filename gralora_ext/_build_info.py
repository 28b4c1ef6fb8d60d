# SPDX-License-Identifier: Apache-2.0
"""What is built, installed and in use, for bug reports and ``gralora-ext info``."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import torch

from . import __version__, _loader


def build_info() -> dict[str, Any]:
    """Versions, compiled CUDA architectures, CPU capability and threads.

    Never raises for a missing extension: ``problem`` then holds the sentence that says what is missing and the command
    that mends it, and what only the extension knows is None. Otherwise ``problem`` is None.

    Keys: version, python, torch, torch_built_with, peft, build ("prebuilt", "jit" or "none"), path, compiler,
    cuda_archs, cpu_capability, cpu_amx (whether bfloat16 activations are multiplied by AMX), compiled_capabilities, threads, openmp (the OpenMP runtimes in this process; one is right),
    problem.
    """
    info: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_built_with": None,
        "peft": _installed_version("peft"),
        "build": "none",
        "path": None,
        "compiler": None,
        "cuda_archs": None,
        "cpu_capability": None,
        "cpu_amx": None,
        "compiled_capabilities": None,
        "threads": torch.get_num_threads(),
        "openmp": openmp_runtimes(),
        "problem": None,
    }
    try:
        native = _loader.load()
    except (ImportError, RuntimeError, ValueError) as error:
        info["problem"] = str(error)
        return info
    built = native.build()
    info.update(
        torch_built_with=built["torch"],
        build=_loader.kind(),
        path=native.__file__,
        compiler=built["compiler"],
        cuda_archs=built["cuda_archs"],
        cpu_capability=native.cpu_capability(),
        cpu_amx=native.cpu_amx(),
        compiled_capabilities=native.compiled_capabilities(),
        threads=native.num_threads(),
        openmp=openmp_runtimes(),
    )
    return info


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def openmp_runtimes() -> list[str]:
    """The paths of the OpenMP runtimes that this process has loaded (Linux; elsewhere an empty list)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted({path for path in re.findall(r"/\S+", maps) if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name)})
