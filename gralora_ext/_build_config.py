# SPDX-License-Identifier: Apache-2.0
"""The sources and flags of the native extension, written once and used by all three builds.

``setup.py`` and ``_loader.py`` (JIT) load this file; ``CMakeLists.txt`` runs it (``--cmake``). It stands alone: only the
standard library is needed, so that it can also say in one sentence what is missing, torch included.

Kernel files are torch-free and compiled once per instruction set, which torch's builders cannot do (they know one set of
flags per extension). So :func:`compile_kernels` makes those objects with ninja first, and they are linked like libraries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
INCLUDE_DIR = "csrc"

# Compiled once, with torch's own flags (they choose the C++ standard).
COMMON_SOURCES = [
    "csrc/registration.cpp",
    "csrc/ops.cpp",
    "csrc/linear_ops.cpp",
    "csrc/coded_ops.cpp",
    "csrc/run.cpp",
    "csrc/result_memory.cpp",
    "csrc/autograd.cpp",
    "csrc/bindings.cpp",
    "csrc/eager_bindings.cpp",
    "csrc/explain_bindings.cpp",
    "csrc/cpu/machine.cpp",
    "csrc/cpu/plan.cpp",
    "csrc/cpu/plan_merge.cpp",
    "csrc/cpu/dispatch.cpp",
]
# Compiled once per capability; they include no torch header.
KERNEL_SOURCES = [
    "csrc/cpu/forward.cpp",
    "csrc/cpu/backward.cpp",
    "csrc/cpu/merge.cpp",
    "csrc/cpu/coded_merge.cpp",
    "csrc/cpu/linear.cpp",
]

# GCC would multiply and add in two steps, rounded twice, where a loop has one sum alone. The bits
# of a token would then depend on how many are beside it.
FMA_FLAGS = ["-mfma", "--param=avoid-fma-max-bits=0"]

# Given before each set's own flags: the user's flags may name another set, such as -march=native,
# and a set must hold its own instructions alone, since the sizes of its panels follow from them.
X86_BASELINE = ["-march=x86-64", "-mno-avx"]
# In rising order: the linker keeps the first copy of a shared inline function, which must be that
# of the portable set.
X86_CAPABILITY_FLAGS = {
    "default": [],
    "avx2": ["-mavx2", *FMA_FLAGS, "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *FMA_FLAGS, "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}

SOURCES_MARK = "gralora_ext built from sources "
INSTALL_COMMAND = "pip install --no-build-isolation ."
EDITABLE_COMMAND = "pip install --no-build-isolation --editable ."


def _sibling(name: str) -> ModuleType:
    """A module of this folder by its file: the package itself would want the extension that is about to be built."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda = _sibling("_build_cuda")
BuildError = cuda.BuildError


class CudaBuild(NamedTuple):
    """What is compiled for CUDA."""

    toolkit: Path
    capabilities: list[str]
    glue_flags: list[str]
    link_flags: list[str]


NO_TORCH = (
    "gralora_ext is compiled against the torch in use, and this Python has none: "
    f"run `pip install torch`, then `{INSTALL_COMMAND}` (without build isolation, or pip hides that torch again)."
)


def capability_flags(machine: str | None = None) -> dict[str, list[str]]:
    """Capability name -> the flags of its instruction set; only ``default`` where ``machine`` is not x86-64."""
    machine = (machine or platform.machine()).lower()
    return X86_CAPABILITY_FLAGS if machine in ("x86_64", "amd64") else {"default": []}


def cxx_flags(optimization: str = "-O3") -> list[str]:
    """Flags of every file, the user's CPPFLAGS, CFLAGS and CXXFLAGS last.

    ``-fopenmp`` is for compiling only: linking it would bring a second OpenMP runtime beside torch's.
    """
    flags = ["-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
    # Python's own flags ask for debug sections: a third of the time for files that include torch,
    # and 20 MB.
    debug = os.environ.get("DEBUG", "").upper() in ("1", "ON", "YES", "TRUE")
    flags += ["-O0", "-g"] if debug else [optimization, "-g0"]
    if os.environ.get("GRALORA_EXT_WERROR") == "1":
        flags.append("-Werror")
    return flags + [
        flag for name in ("CPPFLAGS", "CFLAGS", "CXXFLAGS") for flag in shlex.split(os.environ.get(name, ""))
    ]


def common_flags(torch_version: str, machine: str | None = None, cuda: CudaBuild | None = None) -> list[str]:
    """Flags of COMMON_SOURCES. The version on the command line makes ninja compile anew for another torch.

    GCC 12 warns of overflows where torch's autograd headers fill a ``std::vector<bool>``; there are none.
    """
    have = [f"-DGRALORA_HAVE_{name.upper()}" for name in capability_flags(machine) if name != "default"]
    if cuda is not None:
        have += ["-DGRALORA_HAVE_CUDA", f"-DGRALORA_CUDA_ARCHS={','.join(cuda.capabilities)}", *cuda.glue_flags]
    quiet = ["-Wno-array-bounds", "-Wno-stringop-overflow"]
    return [*cxx_flags(), *quiet, *have, f"-DGRALORA_TORCH_VERSION={torch_version}"]


def kernel_flags(capability: str, machine: str | None = None) -> list[str]:
    """Flags of KERNEL_SOURCES for one capability.

    Functions begin at a cache line: without that, a change elsewhere in a file moved the loops of forward, and cost it up to 7 %.
    """
    capabilities = capability_flags(machine)
    # The portable set serves processors from before 2013 where there are others: -O1 saves more
    # than half of its long compilation.
    optimization = "-O1" if capability == "default" and len(capabilities) > 1 else "-O3"
    flags = [*cxx_flags(optimization), "-falign-functions=64", f"-DGRALORA_CPU_CAPABILITY={capability}"]
    baseline = X86_BASELINE if len(capabilities) > 1 else []
    return ["-std=c++17", *flags, *baseline, *capabilities[capability]]


def cuda_build(torch_version: str, torch_cuda: str | None) -> CudaBuild | None:
    """What is to be compiled for CUDA, by GRALORA_EXT_CUDA and TORCH_CUDA_ARCH_LIST, or None.

    ``torch_version`` and ``torch_cuda`` are ``torch.__version__`` and ``torch.version.cuda``.
    """
    toolkit = cuda.find_toolkit()
    if not cuda.wanted(os.environ.get("GRALORA_EXT_CUDA", "auto"), torch_version, torch_cuda, toolkit):
        return None
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    names = cuda.capabilities(asked, [] if asked.strip() else present_capabilities(), toolkit)
    return CudaBuild(
        toolkit, names, cuda.glue_flags(torch_version, toolkit), cuda.link_flags(torch_version, torch_cuda, toolkit)
    )


def present_capabilities() -> list[str]:
    """The compute capabilities of the devices that torch sees, such as ["9.0"]."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def compiler() -> list[str]:
    """The C++ compiler, ``$CXX`` or ``c++``, as torch's own builders choose it."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def check_tools() -> None:
    """Raises :class:`BuildError` unless a usable compiler and ninja are there, which is then on PATH."""
    cxx = compiler()
    wanted = "run `apt-get install g++` (or your system's equivalent), or set CXX to an installed g++."
    try:
        macros = subprocess.run(
            [*cxx, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        raise BuildError(f"gralora_ext needs a C++ compiler, and '{shlex.join(cxx)}' does not run: {wanted}") from None
    if "__clang__" in macros and sys.platform == "linux":
        raise BuildError(
            f"gralora_ext needs GCC, because clang ('{shlex.join(cxx)}') would bring a second OpenMP runtime "
            f"beside torch's: {wanted}"
        )
    if not put_ninja_on_path():
        raise BuildError("gralora_ext needs ninja to compile: run `pip install ninja`.")


def put_ninja_on_path() -> bool:
    """Whether there is a ninja. Its wheel puts it beside Python, which is not on PATH where a venv is not activated."""
    if shutil.which("ninja") is not None:
        return True
    if importlib.util.find_spec("ninja") is None:
        return False
    import ninja

    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", os.defpath)))
    return True


def cuda_command(source: str, build: CudaBuild, root: Path = ROOT) -> list[str]:
    """nvcc with all but the names of the files."""
    return cuda.command(source, build.capabilities, build.toolkit, root / INCLUDE_DIR, compiler())


def compile_kernels(build_dir: Path, build: CudaBuild | None = None, root: Path = ROOT) -> list[Path]:
    """Compiles the kernels into ``build_dir`` (only what changed): KERNEL_SOURCES for each capability, and those for CUDA.

    One more object holds the digest of all sources, by which the loader tells an extension of other ones. Returns the objects in
    the order in which they must be linked.
    """
    build_dir = build_dir.resolve()
    build_dir.mkdir(parents=True, exist_ok=True)
    rules = [
        "ninja_required_version = 1.3",
        f"cxx = {shlex.join(compiler())}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d -fPIC $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile_cuda",
        "  command = $nvcc -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = []
    for capability in capability_flags():
        flags = [f"-I{root / INCLUDE_DIR}", *kernel_flags(capability)]
        for source in KERNEL_SOURCES:
            objects.append(build_dir / f"{Path(source).stem}.{capability}.o")
            rules += [f"build {objects[-1].name}: compile {_in_ninja(root / source)}"]
            rules += ["  flags = " + shlex.join(flags).replace("$", "$$")]
    if build is not None:
        for source in cuda.SOURCES:
            objects.append(build_dir / f"{Path(source).stem}.cuda.o")
            rules += [f"build {objects[-1].name}: compile_cuda {_in_ninja(root / source)}"]
            rules += ["  nvcc = " + shlex.join(cuda_command(source, build, root)).replace("$", "$$")]
    mark = f'extern const char gralora_sources[];\nconst char gralora_sources[] = "{SOURCES_MARK}{digest_of_sources(root)}";\n'
    _write_changed(build_dir / "sources.cpp", mark)
    objects.append(build_dir / "sources.o")
    rules += ["build sources.o: compile sources.cpp", "  flags ="]
    _write_changed(build_dir / "build.ninja", "\n".join(rules) + "\n")
    jobs = os.environ.get("MAX_JOBS", "")
    command = ["ninja", *(["-j", jobs] if jobs.isdigit() else [])]
    try:
        subprocess.run(command, cwd=build_dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(compile_failure(error.stdout)) from None
    return objects


def digest_of_sources(root: Path = ROOT) -> str:
    """The SHA-256 of all that the extension is compiled from, which it carries: see :func:`compile_kernels`."""
    value = hashlib.sha256()
    for path in sorted((root / INCLUDE_DIR).rglob("*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            content = path.read_bytes()
            value.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return value.hexdigest()


def _write_changed(path: Path, text: str) -> None:
    """Leaves a file of this content as it is, so that ninja makes nothing anew of it."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _in_ninja(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compile_failure(ninja_output: str) -> str:
    """A message with the beginning of the first failure in ninja's output."""
    lines = ninja_output[max(ninja_output.find("FAILED: "), 0) :].splitlines()
    return "\n".join(["the compiler refused a source of gralora_ext:", *lines[:40]])


def torch_standard() -> str:
    """The C++ standard that torch's own builder passes, such as ``20`` (CMake's torch target does not carry it)."""
    spec = importlib.util.find_spec("torch.utils.cpp_extension")
    found = re.search(r"-std=c\+\+(\d+)", Path(spec.origin).read_text()) if spec and spec.origin else None
    return found.group(1) if found else "17"


def cmake(machine: str | None = None) -> str:
    """The lists above as CMake ``set`` commands, and where torch's CMake files are."""
    try:
        import torch
    except ImportError:
        raise BuildError(NO_TORCH) from None

    def command(name: str, values: list[str]) -> str:
        return f"set({name} {' '.join(f'[==[{value}]==]' for value in values)})\n"

    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    build = cuda_build(torch.__version__, torch.version.cuda)
    lines = [
        command("GRALORA_COMMON_SOURCES", COMMON_SOURCES),
        command("GRALORA_KERNEL_SOURCES", KERNEL_SOURCES),
        command("GRALORA_INCLUDE_DIR", [INCLUDE_DIR]),
        command("GRALORA_COMMON_FLAGS", common_flags(torch.__version__, machine, build)),
        command("GRALORA_CAPABILITIES", list(capability_flags(machine))),
        command("GRALORA_TORCH_PREFIX", [torch.utils.cmake_prefix_path]),
        command("GRALORA_TORCH_CUDA", [torch.version.cuda or ""]),
        command("GRALORA_TORCH_LIB", [str(torch_folder / "lib")]),
        command("GRALORA_TORCH_INCLUDE", [str(include), str(include / "torch/csrc/api/include")]),
        command("GRALORA_TORCH_STANDARD", [torch_standard()]),
    ]
    lines += [
        command(f"GRALORA_KERNEL_FLAGS_{name}", kernel_flags(name, machine)) for name in capability_flags(machine)
    ]
    if build is not None:
        lines += [command("GRALORA_CUDA_SOURCES", cuda.SOURCES), command("GRALORA_CUDA_LINK", build.link_flags)]
        lines += [command(f"GRALORA_CUDA_COMMAND_{Path(s).stem}", cuda_command(s, build)) for s in cuda.SOURCES]
    return "".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--cmake"]:
        sys.exit("usage: _build_config.py --cmake [MACHINE]")
    sys.path.pop(0)  # this file's folder: its modules are not top-level ones
    try:
        sys.stdout.write(cmake(*sys.argv[2:3]))
    except BuildError as error:
        sys.exit(str(error))
