# SPDX-License-Identifier: Apache-2.0
"""The CUDA half of the build: whether it is built, with which toolkit, for which devices, and nvcc's command lines.

Loaded by ``_build_config.py``, by its file; only the standard library is needed. No GPU and no CUDA build of torch is needed
either: the kernels are free of torch, and what calls them takes stream and device from torch's own interfaces.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

SOURCES = [f"csrc/cuda/{name}.cu" for name in ("launch", "bfloat16", "float16", "float32", "conformance")]
PORTABLE = SOURCES[:1]  # the others use tensor cores of 8.0 and above, and launch.cu calls them there
# Compute capabilities that are built for where none is asked for and no device is there; those that
# nvcc knows.
CAPABILITIES = ("7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


class BuildError(RuntimeError):
    """What the machine lacks to build the extension: one sentence that ends with the command that mends it."""


@functools.cache
def find_toolkit() -> Path | None:
    """The first of :func:`toolkit_roots` that has nvcc and the headers."""
    for root in toolkit_roots():
        if os.access(root / "bin" / "nvcc", os.X_OK) and (root / "include" / "cuda_runtime.h").is_file():
            return root
    return None


def toolkit_roots() -> Iterator[Path]:
    """CUDA_HOME or CUDA_PATH alone; else the toolkit of the nvcc on PATH, /usr/local/cuda, and that of pip's packages."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        yield Path(named)
        return
    nvcc = shutil.which("nvcc")
    if nvcc is not None:  # it may be a link or a script; where its toolkit is, it tells itself
        command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
        said = subprocess.run(command, check=False, capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)
        if top is not None:
            yield Path(top[1].strip()).resolve()
    yield Path("/usr/local/cuda")
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        yield Path(folder) / "cu13"


def wanted(setting: str, torch_version: str, torch_cuda: str | None, toolkit: Path | None) -> bool:
    """Whether to compile for CUDA: ``GRALORA_EXT_CUDA`` against what torch and the machine have.

    ``setting`` is auto, 0 or 1; ``torch_cuda`` is ``torch.version.cuda``. A GPU is never asked for: builds also run where
    there is none, and with 1 also against a torch without CUDA.
    """
    if setting not in ("auto", "0", "1"):
        raise BuildError(f"GRALORA_EXT_CUDA must be auto, 0 or 1, but it is '{setting}': run `unset GRALORA_EXT_CUDA`.")
    if setting == "0" or (setting == "auto" and not (torch_cuda and toolkit)):
        return False
    if toolkit is None:
        raise BuildError(
            "GRALORA_EXT_CUDA=1, but no CUDA toolkit (nvcc) was found: "
            "install one and run `export CUDA_HOME=<its folder>`, or `unset GRALORA_EXT_CUDA`."
        )
    if not torch_cuda and hides_streams(torch_version):
        raise BuildError(
            f"GRALORA_EXT_CUDA=1 beside a torch without CUDA needs torch 2.11 or newer, and this is {torch_version}: "
            "run `pip install --upgrade torch`, or `unset GRALORA_EXT_CUDA`."
        )
    version = toolkit_version(toolkit)
    if torch_cuda and torch_cuda.split(".")[0] != version.split(".")[0]:
        raise BuildError(
            f"the CUDA toolkit in {toolkit} is {version}, but this torch was built for CUDA {torch_cuda}: install a toolkit of "
            "that version and run `export CUDA_HOME=<its folder>`, or `export GRALORA_EXT_CUDA=0` for the CPU alone."
        )
    return True


@functools.cache
def toolkit_version(toolkit: Path) -> str:
    """The toolkit's version, such as 13.0."""
    said = subprocess.run([toolkit / "bin" / "nvcc", "--version"], check=False, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise BuildError(f"{toolkit}/bin/nvcc does not run: reinstall the toolkit, or `export GRALORA_EXT_CUDA=0`.")
    return found[1]


@functools.cache
def _known(toolkit: Path) -> frozenset[str]:
    said = subprocess.run([toolkit / "bin" / "nvcc", "--list-gpu-arch"], check=True, capture_output=True, text=True)
    return frozenset(re.findall(r"compute_(\d+)", said.stdout))


def capabilities(asked: str, present: list[str], toolkit: Path) -> list[str]:
    """The devices to build for, such as ["8.0", "9.0+PTX"]; the PTX of the newest serves devices still to come.

    ``asked`` is ``TORCH_CUDA_ARCH_LIST`` (numbers, separated by blanks or semicolons), ``present`` are the capabilities of the
    devices in this machine. Where both are empty it is all that we know of. Where nvcc knows none of the devices, they are newer
    than it, and get the PTX of the newest that it knows.
    """
    if asked.strip():
        names = re.split(r"[\s;]+", asked.strip())
        for name in names:
            if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", name) or _number(name).rstrip("af") not in _known(toolkit):
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST holds '{name}', which is no compute capability that nvcc "
                    f"{toolkit_version(toolkit)} knows, such as 9.0 or 9.0+PTX: run `unset TORCH_CUDA_ARCH_LIST`."
                )
        return names
    known = [name for name in CAPABILITIES if _number(name) in _known(toolkit)]
    names = sorted(set(present), key=lambda name: tuple(map(int, name.split("."))))
    names = [name for name in names if _number(name) in _known(toolkit)] or (known[-1:] if present else known)
    return [*names[:-1], f"{names[-1]}+PTX"] if names else []


def _number(capability: str) -> str:
    return capability.removesuffix("+PTX").replace(".", "")


def codes(source: str, names: list[str]) -> list[str]:
    """What ``source`` is compiled into for the devices ``names``, such as ["sm_80", "compute_80"]: machine code and PTX.

    Where launch.cu has code for a device from 8.0 on, so have the kernels that it calls there. The PTX of an older device serves
    all later ones: then these kernels get the PTX of 8.0.
    """
    found = []
    for name in names:
        number, has_ptx = _number(name), name.endswith("+PTX")
        if source in PORTABLE or float(number.rstrip("af")) >= 80:
            found += [f"sm_{number}", *([f"compute_{number}"] if has_ptx else [])]
        elif has_ptx:
            found.append("compute_80")
    # A file without a device to be compiled for still defines what launch.cu calls.
    return list(dict.fromkeys(found)) or ["compute_80"]


def command(source: str, names: list[str], toolkit: Path, include: Path, compiler: list[str]) -> list[str]:
    """nvcc with all but the names of the files."""
    line = [str(toolkit / "bin" / "nvcc"), "-std=c++17", "-O3", f"-I{include}", f"-I{include / 'cuda'}"]
    line += ["-ccbin", shlex.join(compiler)] if len(compiler) == 1 else []
    line += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"]
    if os.environ.get("GRALORA_EXT_WERROR") == "1":
        line += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"]
    for code in codes(source, names):
        line += ["-gencode", f"arch=compute_{code.split('_')[1]},code={code}"]
    return line


def link_flags(torch_version: str, torch_cuda: str | None, toolkit: Path) -> list[str]:
    """torch's own CUDA runtime where it has one, so that there is one in the process; else a copy inside the extension."""
    folder = next((toolkit / name for name in ("lib64", "lib") if (toolkit / name).is_dir()), toolkit / "lib64")
    if torch_cuda:
        # pip's packages have the library by its full name alone.
        full = sorted(folder.glob("libcudart.so.*"))
        name = f"-l:{full[0].name}" if full and not (folder / "libcudart.so").exists() else "-lcudart"
        return [f"-L{folder}", name, *(["-lc10_cuda"] if hides_streams(torch_version) else [])]
    return [str(folder / "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]


def hides_streams(torch_version: str) -> bool:
    """Whether only the CUDA half of torch, and its headers, give the handle of a stream: before 2.11."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return (major, minor) < (2, 11)


def glue_flags(torch_version: str, toolkit: Path) -> list[str]:
    """What the C++ sources need to call the kernels."""
    return ["-DGRALORA_CUDA_STREAM_HEADER", f"-isystem{toolkit / 'include'}"] if hides_streams(torch_version) else []
