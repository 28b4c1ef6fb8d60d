# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources without a GPU: by g++ on the emulator, by nvcc to PTX. Results are kept and reused."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gralora_ext import _build_config as config

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
KERNELS = REPOSITORY / "csrc" / "cuda"
EMULATOR = HERE / "emulator"
ARCHS = (80, 90, 86, 89, 100, 120)  # those of the tables first

# gcc's unique symbols would make all emulated libraries of a process share one emulator.
# Both compilers know `#pragma unroll`, under different names.
HOST_FLAGS = ("-std=c++17", "-g", "-fno-gnu-unique", f"-ffile-prefix-map={REPOSITORY}=.")
STRICT = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
VARIANTS = {
    "plain": ("-O2",),
    "asan": ("-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "tsan": ("-O1", "-fsanitize=thread"),
    # Where a build serves one short run
    "quick": ("-Og", "-g0", "-DGRALORA_TEST_FEW_PAIRS"),
    "quick_tsan": ("-Og", "-fsanitize=thread", "-DGRALORA_TEST_FEW_PAIRS"),
}
NVCC_FLAGS = ("-std=c++17", "-O3")
NVCC_STRICT = ("-Werror", "all-warnings")
PTXAS_STRICT = ("-Xptxas", "-v,-warn-spills,-warn-lmem-usage")
KEPT = 30 * 24 * 3600  # seconds that a result is kept unused


@dataclass(frozen=True)
class Toolkit:
    """CUDA's headers, and nvcc where it came with them."""

    include: Path
    nvcc: Path | None


@dataclass(frozen=True)
class Cubin:
    """A device's code, and what the assembler said of it."""

    path: Path
    log: str


class CompileError(Exception):
    """What the compiler said."""


@functools.cache
def find_toolkit() -> Toolkit | None:
    """The first place where the build would look that has headers."""
    for root in config.cuda.toolkit_roots():
        include = root / "include"
        if all((include / header).is_file() for header in ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h")):
            nvcc = root / "bin" / "nvcc"
            return Toolkit(include, nvcc if os.access(nvcc, os.X_OK) else None)
    return None


def compiler() -> str | None:
    """g++, whatever CXX says: the flags are its own."""
    return shutil.which("g++")


def emulated_library(
    source: Path, variant: str = "plain", *, include: Sequence[Path] = (), kernels: Path = KERNELS
) -> Path:
    """A shared library of the kernels of ``source`` on the emulator.

    The sanitizers' variants can be loaded only into a process that was linked with them: see ``emulated_program``.
    """
    return _host_compile([source], variant, (kernels, *include), ("-fPIC", "-shared"), ".so")


def emulated_program(
    sources: Sequence[Path], variant: str, *, include: Sequence[Path] = (), kernels: Path = KERNELS
) -> Path:
    """An executable of the same; one of the sources has ``main``."""
    return _host_compile(sources, variant, (kernels, *include), (), "")


def ptx(source: Path, arch: int, *, include: Sequence[Path] = (), flags: Sequence[str] = ()) -> str:
    """The PTX that nvcc makes of ``source`` for compute capability ``arch`` (80, 90)."""
    command = [*_nvcc(include), *NVCC_STRICT, *flags, "-ptx", f"-arch=compute_{arch}", str(source)]
    return _cached(command, ".ptx", (KERNELS, HERE, *include)).read_text()


def cubin(source: Path, arch: int, *, include: Sequence[Path] = (), strict: bool = True) -> Cubin:
    """The code of ``source`` for devices of compute capability ``arch``. strict: spills and warnings are errors."""
    flags = (*NVCC_STRICT, *PTXAS_STRICT) if strict else ()
    command = [*_nvcc(include), *flags, "-cubin", f"-arch=sm_{arch}", str(source)]
    built = _cached(command, ".cubin", (KERNELS, HERE, *include))
    return Cubin(built, built.with_suffix(".log").read_text())


def kernels_cubin(arch: int) -> Cubin:
    """Of all kernels, none spilled"""
    return cubin(HERE / "kernels.cu", arch, include=[KERNELS.parent])


def sanitized_kernels(variant: str) -> Path:
    return emulated_program([HERE / "kernels_main.cpp", HERE / "kernels.cu"], variant, include=[KERNELS.parent])


def torch_device() -> Path:
    """A library for ``torch.ops.load_library``: the operations on emulated devices (``device/``), by the C++ of csrc/."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    kernels = emulated_library(HERE / "kernels.cu", include=[KERNELS.parent])
    csrc = [KERNELS.parent / f"{name}.cpp" for name in ("ops", "linear_ops", "run", "result_memory")]
    flags = [f"-std=c++{config.torch_standard()}", "-O1", "-fPIC", "-fvisibility=hidden", "-fopenmp", *STRICT]
    flags += ["-Wno-array-bounds", "-Wno-stringop-overflow", "-DGRALORA_HAVE_CUDA", f"-I{KERNELS.parent}"]
    flags += [f"-isystem{folder}" for folder in include_paths()]
    # The version: for another torch all is compiled anew.
    compile_one = [compiler() or "g++", *flags, f"-DGRALORA_TORCH_VERSION={torch.__version__}", "-c"]
    roots = (KERNELS.parent, HERE / "device")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [str(source) for source in (*csrc, *sorted((HERE / "device").glob("*.cpp")))]
        objects = list(pool.map(lambda source: str(_cached([*compile_one, source], ".o", roots)), sources))
    link = [compile_one[0], "-shared", *objects, str(kernels), *(f"-L{folder}" for folder in library_paths())]
    link += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{kernels.parent}"]
    return _cached(link, ".so", ())


def nvcc_version() -> str:
    """Such as ``13.0.88``"""
    said = subprocess.run([_nvcc(())[0], "--version"], check=True, capture_output=True, text=True)
    return re.search(r"V([\d.]+)", said.stdout)[1]


def _nvcc(include: Sequence[Path]) -> list[str]:
    toolkit = find_toolkit()
    if toolkit is None or toolkit.nvcc is None:
        raise FileNotFoundError("there is no nvcc")
    return [str(toolkit.nvcc), *NVCC_FLAGS, *_includes((KERNELS, *include))]


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs an emulated program. A report of TSan ends it with 66, one of ASan or UBSan with 67."""
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "exitcode=66 halt_on_error=1 report_signal_unsafe=0 atexit_sleep_ms=0",
        # A launch that fails leaves the stacks of its threads as they are: what is on them is lost.
        "ASAN_OPTIONS": "exitcode=67 detect_leaks=0",
        "UBSAN_OPTIONS": "exitcode=67 print_stacktrace=1",
    }
    command = [str(program), *arguments]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:  # TSan of gcc 12 where addresses are randomised in more than 28 bits
        command = ["setarch", os.uname().machine, "-R", *command]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    return done


def _includes(folders: Sequence[Path]) -> list[str]:
    return [f"-I{folder}" for folder in folders]


def _host_compile(
    sources: Sequence[Path], variant: str, include: Sequence[Path], flags: Sequence[str], suffix: str
) -> Path:
    toolkit, cxx = find_toolkit(), compiler()
    if toolkit is None or cxx is None:
        raise FileNotFoundError("there are no CUDA headers" if toolkit is None else "there is no C++ compiler")
    strict = STRICT if KERNELS in include else ()  # a defect that is planted in a copy may well leave a name unused
    folders = _includes((*include, EMULATOR))
    # As system headers: their warnings are not ours.
    command = [
        cxx,
        *HOST_FLAGS,
        *strict,
        *VARIANTS[variant],
        *folders,
        "-isystem",
        str(toolkit.include),
        *flags,
        "-x",
        "c++",
    ]
    return _cached([*command, *map(str, sources), "-ldl"], suffix, (KERNELS, HERE, *include))


def _cached(command: Sequence[str], suffix: str, roots: Sequence[Path]) -> Path:
    """Runs ``command`` with an output file, unless that exists for the same command, compiler and sources of ``roots``.

    Wherever checkout and environment lie: CI's are new ones each time.
    """

    def named(text: str) -> bytes:
        return text.replace(str(REPOSITORY), "checkout").replace(sys.prefix, "environment").encode()

    digest = hashlib.sha256(named("\0".join(command)))
    digest.update(subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout)
    for file in sorted(_sources(roots)):
        digest.update(named(str(file)) + b"\0" + file.read_bytes() + b"\0")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gralora_ext" / "cuda_on_cpu"
    built = cache / (digest.hexdigest()[:32] + suffix)
    cache.mkdir(parents=True, exist_ok=True)
    with _being_built[built]:  # perhaps by another thread
        if not built.exists():
            _build(command, built)
            for file in cache.iterdir():
                if file.is_file() and time.time() - file.stat().st_mtime > KEPT:
                    file.unlink(missing_ok=True)
        for used in (built, built.with_suffix(".log")):
            os.utime(used)
    return built


_being_built: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


def _build(command: Sequence[str], built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        output = Path(folder) / ("output" + built.suffix)
        done = subprocess.run([*command, "-o", str(output)], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        (Path(folder) / "log").write_text(done.stderr)
        (Path(folder) / "log").replace(built.with_suffix(".log"))
        output.replace(built)  # other processes see all of it or nothing


def _sources(roots: Sequence[Path]) -> set[Path]:
    """All that a source may include of ours, wanted or not: too many rebuilds are better than one too few."""
    suffixes = {".h", ".cuh", ".cu", ".cpp"}
    return {file for root in roots for file in root.rglob("*") if file.suffix in suffixes}
