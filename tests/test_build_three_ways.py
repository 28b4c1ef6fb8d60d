# SPDX-License-Identifier: Apache-2.0
"""The wheel, the JIT build and the CMake build, all from one unpacked sdist, are the same extension."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import build_helpers as helpers
import pytest

import gralora_ext

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def wheel_python(tree: Path, builds: Path) -> Path:
    """An environment's Python with the wheel installed; the wheel was built from the sdist."""
    python = helpers.make_environment(builds / "environment")
    env = helpers.environment()
    helpers.pip(python, "wheel", tree, "--wheel-dir", builds / "wheel", env=env, cwd=builds)
    (wheel,) = (builds / "wheel").iterdir()
    helpers.pip(python, "install", "--ignore-installed", wheel, env=env, cwd=builds)
    return python


@pytest.fixture(scope="module")
def jit_env(tree: Path, builds: Path) -> dict[str, str]:
    extensions = str(builds / "torch_extensions")
    return helpers.environment(GRALORA_EXT_JIT="1", PYTHONPATH=str(tree), TORCH_EXTENSIONS_DIR=extensions)


@pytest.fixture(scope="module")
def cmake_build(tree: Path, builds: Path) -> Path:
    env = helpers.environment()
    build = builds / "cmake"
    helpers.run("cmake", "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", env=env, cwd=tree)
    helpers.run("cmake", "--build", build, env=env, cwd=tree)
    return build


@pytest.fixture(scope="module")
def wheel(wheel_python: Path, builds: Path) -> dict[str, Any]:
    return helpers.probe(wheel_python, env=helpers.environment(), cwd=builds)


@pytest.fixture(scope="module")
def jit(jit_env: dict[str, str], builds: Path) -> dict[str, Any]:
    return helpers.probe(env=jit_env, cwd=builds)


@pytest.fixture(scope="module")
def cmake(cmake_build: Path, builds: Path) -> dict[str, Any]:
    """The probe with CMake's library beside the Python half of the package."""
    place = builds / "cmake_package"
    helpers.copy_package(place)
    helpers.run("cmake", "--install", cmake_build, "--prefix", place, env=helpers.environment(), cwd=builds)
    return helpers.probe(env=helpers.environment(PYTHONPATH=str(place)), cwd=builds)


def test_the_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = ["setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"]
    for pattern in (
        "csrc/**/*",
        "gralora_ext/**/*.py",
        "gralora_ext/*.pyi",
        "tests/**/*.py",
        "tests/cpp/*",
        "scripts/*",
    ):
        wanted += [str(p.relative_to(helpers.REPOSITORY)) for p in helpers.REPOSITORY.glob(pattern) if p.is_file()]
    if (helpers.REPOSITORY / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=helpers.REPOSITORY, capture_output=True, text=True, check=True
        ).stdout
        wanted += [name for name in listed.split("\0") if (helpers.REPOSITORY / name).is_file()]
    assert len(wanted) > 40
    assert [name for name in wanted if name not in held] == []


def test_the_sdist_holds_nothing_that_jobs_leave(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert held.isdisjoint(helpers.LEFT_BY_JOBS)


def test_the_wheel_works_in_another_folder(wheel: dict[str, Any], builds: Path) -> None:
    assert Path(wheel["package"]).is_relative_to(builds / "environment")
    assert wheel["info"]["build"] == "prebuilt"
    assert wheel["info"]["problem"] is None
    assert wheel["error"] < 1e-6


def test_in_a_checkout_the_installed_extension_serves_the_sources(
    wheel_python: Path, wheel: dict[str, Any], tree: Path, builds: Path
) -> None:
    result = helpers.probe(wheel_python, env=helpers.environment(PYTHONPATH=str(tree)), cwd=tree)
    assert Path(result["package"]).parent == tree / "gralora_ext"
    assert Path(result["info"]["path"]).is_relative_to(builds / "environment")
    assert result["digest"] == wheel["digest"]


def test_the_wheel_holds_no_sources(wheel_python: Path, builds: Path) -> None:
    listing = helpers.run(
        sys.executable, "-m", "zipfile", "-l", *(builds / "wheel").iterdir(), env={}, cwd=builds
    ).stdout
    assert "_C.cpython" in listing and "py.typed" in listing and "_C.pyi" in listing
    assert not re.search(r"\.cpp|tests/", listing)


def test_wheel_jit_and_cmake_give_the_same_bits(
    wheel: dict[str, Any], jit: dict[str, Any], cmake: dict[str, Any]
) -> None:
    assert jit["info"]["build"] == "jit"
    assert wheel["digest"] == jit["digest"]
    assert wheel["digest"] == cmake["digest"]


@pytest.mark.parametrize("build", ["wheel", "jit", "cmake"])
def test_torch_openmp_runtime_is_the_only_one(build: str, request: pytest.FixtureRequest) -> None:
    info = request.getfixturevalue(build)["info"]
    (runtime,) = info["openmp"]
    assert "torch" in Path(runtime).parts or "torch.libs" in Path(runtime).parts
    # Where torch's runtime keeps its common name, a second one in need would be the same file: look
    # at the need itself.
    headers = subprocess.run(["objdump", "-p", info["path"]], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in headers and not re.search(r"NEEDED\s+lib(gomp|iomp|omp)", headers)


def test_cpp_unit_tests_pass(cmake_build: Path) -> None:
    output = helpers.run("ctest", "-j2", "--output-on-failure", env=helpers.environment(), cwd=cmake_build).stdout
    assert int(re.search(r"100% tests passed.* out of (\d+)", output).group(1)) >= 4


def test_cmake_configures_again_where_the_config_has_changed(cmake_build: Path) -> None:
    (files,) = re.findall(r"^build build\.ninja.*?:(.*)", (cmake_build / "build.ninja").read_text(), re.MULTILINE)
    assert {"_build_config.py", "_build_cuda.py"} <= {Path(name).name for name in files.split()}


def test_cmake_compiles_kernels_with_the_flags_of_the_config(cmake_build: Path) -> None:
    commands = json.loads((cmake_build / "compile_commands.json").read_text())
    listed = helpers.run(
        sys.executable,
        "-c",
        "import json, gralora_ext._build_config as c; "
        "flags = {n: ' '.join(c.kernel_flags(n)) for n in c.capability_flags()}; "
        "print(json.dumps([len(c.KERNEL_SOURCES), flags]))",
        env=helpers.environment(PYTHONPATH=str(helpers.REPOSITORY)),
        cwd=cmake_build,
    ).stdout
    sources, flags_of = json.loads(listed)
    for capability, flags in flags_of.items():
        kernels = [c for c in commands if f"kernels_{capability}.dir" in c["command"]]
        assert len(kernels) == sources and all(flags in c["command"] for c in kernels)


@pytest.mark.parametrize("cap", ["default", "avx2", "avx512"])
def test_the_environment_caps_the_capability(cap: str, wheel_python: Path, wheel: dict[str, Any], builds: Path) -> None:
    order = ["default", "avx2", "avx512"]
    machine = {"AVX512": "avx512", "AVX2": "avx2"}.get(wheel["torch_capability"], "default")
    capped = helpers.probe(wheel_python, env=helpers.environment(GRALORA_EXT_CPU_CAPABILITY=cap), cwd=builds)
    assert capped["info"]["cpu_capability"] == order[min(order.index(cap), order.index(machine))]
    assert capped["error"] < 1e-6


def test_portable_code_holds_no_vector_extension() -> None:
    """A function outside the kernels' own namespaces must run on every x86-64: no AVX instruction (all begin with v).

    This fails when the linker keeps an inline function that was compiled for a wider set. Of the extension in use, which is
    optimized as users have it: without optimization functions are kept that are inlined there.
    """
    info = gralora_ext.build_info()
    if info["compiled_capabilities"] == ["default"]:
        pytest.skip("no other instruction set is compiled for this processor")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", info["path"]]
    disassembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wide_in: dict[str, set[str]] = {"portable": set(), "avx2": set(), "avx512": set()}
    function = ""
    for line in disassembly.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = header.group(1)
        elif re.match(r"\s*[0-9a-f]+:\s+v[a-z0-9]+\s", line):
            kind = next((name for name in ("avx2", "avx512") if f"isa_{name}" in function), "portable")
            wide_in[kind].add(function)
    assert wide_in["avx2"] and wide_in["avx512"]
    assert wide_in["portable"] == set()


def test_jit_compiles_nothing_when_nothing_changed(jit: dict[str, Any], jit_env: dict[str, str], builds: Path) -> None:
    library = Path(jit["info"]["path"])
    before = library.stat().st_mtime_ns
    start = time.monotonic()
    assert helpers.probe(env=jit_env, cwd=builds)["digest"] == jit["digest"]
    assert library.stat().st_mtime_ns == before
    assert time.monotonic() - start < 20


def test_jit_follows_a_changed_kernel_in_two_processes_at_once(
    jit: dict[str, Any], jit_env: dict[str, str], tree: Path, builds: Path
) -> None:
    library = Path(jit["info"]["path"])
    mark = b"a changed kernel"
    assert mark not in library.read_bytes()
    (library.parent / "lock").touch()  # what torch leaves behind when a process is killed while it builds
    with open(tree / "csrc/cpu/merge.cpp", "a") as file:
        file.write(f'\nnamespace {{ __attribute__((used)) const char kMark[] = "{mark.decode()}"; }}\n')
    command = [sys.executable, "-c", helpers.PROBE]
    pair = [
        subprocess.Popen(command, env=jit_env, cwd=builds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert all(json.loads(output.splitlines()[-1])["digest"] == jit["digest"] for output in outputs)
    assert mark in library.read_bytes()


def test_editable_install_runs_from_the_tree(wheel_python: Path, tree: Path, builds: Path) -> None:
    # Last, and in the wheel's place: with the same paths, the wheel's objects serve, and little is
    # compiled again.
    env = helpers.environment()
    helpers.run(wheel_python, "-m", "pip", "uninstall", "--yes", "gralora_ext", env=env, cwd=builds)
    helpers.pip(wheel_python, "install", "--ignore-installed", "--editable", tree, env=env, cwd=builds)
    result = helpers.probe(wheel_python, env=env, cwd=builds)
    assert Path(result["package"]).parent == tree / "gralora_ext"
    assert result["info"]["build"] == "prebuilt"
    console = shutil.which("gralora-ext", path=str(wheel_python.parent))
    assert console and helpers.run(console, "--version", env=env, cwd=builds).stdout == "gralora-ext 0.1.0\n"
