# SPDX-License-Identifier: Apache-2.0
"""The one list of sources and flags, and the decisions that need no compiler."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_python

import gralora_ext
from gralora_ext import _build_config as config

ROOT = Path(__file__).resolve().parent.parent


def test_every_source_file_is_listed_once() -> None:
    listed = config.COMMON_SOURCES + config.KERNEL_SOURCES
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    assert len({Path(source).stem for source in listed}) == len(listed)  # torch names an object by its source's stem


def test_kernels_include_no_torch_header() -> None:
    for path in (ROOT / "csrc" / "cpu").iterdir():
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert includes and not [line for line in includes if any(word in line for word in ("torch", "ATen", "c10"))]


def test_no_flag_narrows_the_machine_or_the_maths() -> None:
    flags = [*config.common_flags(torch.__version__)]
    for capability in config.capability_flags():
        flags += config.kernel_flags(capability)
    assert "-fopenmp" in flags
    flags = [flag for flag in flags if flag not in config.X86_BASELINE]
    assert not [flag for flag in flags if flag.startswith(("-march", "-mtune", "-ffast-math", "-Ofast", "-funsafe"))]
    assert not [flag for flag in config.common_flags(torch.__version__) if flag.startswith("-std")]


@pytest.mark.parametrize(
    ("machine", "capabilities"),
    [
        ("x86_64", ["default", "avx2", "avx512"]),
        ("AMD64", ["default", "avx2", "avx512"]),
        ("aarch64", ["default"]),
        ("arm64", ["default"]),
        ("ppc64le", ["default"]),
    ],
)
def test_capabilities_of_a_machine(machine: str, capabilities: list[str]) -> None:
    assert list(config.capability_flags(machine)) == capabilities
    have = [flag for flag in config.common_flags("2.13.0", machine) if flag.startswith("-DGRALORA_HAVE_")]
    assert have == [f"-DGRALORA_HAVE_{name.upper()}" for name in capabilities[1:]]
    found = [flag for flag in config.kernel_flags("default", machine) if flag.startswith("-m")]
    assert found == (config.X86_BASELINE if len(capabilities) > 1 else [])


def test_the_users_flags_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O1 -DNAME='two words'")
    flags = config.cxx_flags()
    assert flags[-2:] == ["-O1", "-DNAME=two words"]
    assert flags.index("-O3") < flags.index("-O1")


@pytest.mark.skipif(len(config.capability_flags()) == 1, reason="a processor of one set")
@pytest.mark.parametrize("user", ["", "-march=native", "-march=x86-64-v3", "-march=x86-64-v4", "-mavx512f -mavx2"])
def test_a_set_of_kernels_has_its_own_instructions_whatever_the_users_flags_say(
    user: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXXFLAGS", user)
    (tmp_path / "asks.cpp").write_text('#include "cpu/simd.h"\n')  # which refuses other ones
    for name in config.capability_flags():
        flags = [flag for flag in config.kernel_flags(name) if flag != "-fopenmp"]
        command = [*config.compiler(), *flags, f"-I{ROOT / 'csrc'}", "-E", "-dM", str(tmp_path / "asks.cpp")]
        macros = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = [m for m in ("__AVX__", "__FMA__", "__AVX2__", "__AVX512F__", "__AVX512VNNI__") if f" {m} " in macros]
        expected = {"default": 0, "avx2": 3, "avx512": 4}[name]
        assert len(found) == expected, (name, found)


@pytest.mark.skipif(len(config.capability_flags()) == 1, reason="a processor of one set")
def test_flags_of_another_set_are_refused_by_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "asks.cpp").write_text('#include "cpu/simd.h"\n')
    command = [*config.compiler(), *config.kernel_flags("default"), "-mavx2", f"-I{ROOT / 'csrc'}", "-fsyntax-only"]
    done = subprocess.run([*command, str(tmp_path / "asks.cpp")], check=False, capture_output=True, text=True)
    assert "the compiler's flags are those of another instruction set" in done.stderr


def test_torchs_builder_finds_the_ninja_of_an_environment_that_is_not_activated(tmp_path: Path) -> None:
    code = (
        "import sys, setuptools; setuptools.setup = lambda **options: found.update(options); found = {}; "
        f"sys.path.insert(0, {str(ROOT)!r}); import setup; "
        "print(found['cmdclass']['build_ext'](setuptools.Distribution()).use_ninja)"
    )
    (tmp_path / "bin").mkdir()
    assert run_python(code, PATH=str(tmp_path / "bin")).strip().endswith("True")


@pytest.mark.parametrize(("debug", "level"), [("", "-O3"), ("0", "-O3"), ("1", "-O0"), ("on", "-O0")])
def test_debug_switches_optimisation_off(debug: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXXFLAGS", raising=False)
    monkeypatch.setenv("DEBUG", debug)
    flags = config.cxx_flags()
    assert [flag for flag in flags if flag.startswith("-O")] == [level]
    assert ("-g" in flags) == (level == "-O0")


def test_cmake_gets_the_same_lists() -> None:
    script = ROOT / "gralora_ext" / "_build_config.py"
    text = subprocess.run([sys.executable, script, "--cmake"], capture_output=True, text=True, check=True).stdout
    lines = dict(line.removeprefix("set(").removesuffix(")").split(" ", 1) for line in text.splitlines())

    def values(name: str) -> list[str]:
        return lines[name].removeprefix("[==[").removesuffix("]==]").split("]==] [==[")

    assert values("GRALORA_COMMON_SOURCES") == config.COMMON_SOURCES
    assert values("GRALORA_KERNEL_SOURCES") == config.KERNEL_SOURCES
    build = config.cuda_build(torch.__version__, torch.version.cuda)
    assert values("GRALORA_COMMON_FLAGS") == config.common_flags(torch.__version__, cuda=build)
    assert values("GRALORA_CAPABILITIES") == list(config.capability_flags())
    for capability in config.capability_flags():
        assert values(f"GRALORA_KERNEL_FLAGS_{capability}") == config.kernel_flags(capability)
    assert (Path(values("GRALORA_TORCH_PREFIX")[0]) / "Torch" / "TorchConfig.cmake").is_file()


def test_a_wheel_holds_no_module_of_an_earlier_build(tmp_path: Path) -> None:
    """Nor does a build take away what it compiled, and never the sources."""
    source, build = tmp_path / "source", tmp_path / "source" / "build"
    (source / "gralora_ext").mkdir(parents=True)
    config_files = ("gralora_ext/_build_config.py", "gralora_ext/_build_cuda.py")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", *config_files):
        shutil.copy(ROOT / name, source / name)
    for name in ("__init__", "gone"):
        (source / "gralora_ext" / f"{name}.py").write_text('__version__ = "1"\n')
    (build / "kernels").mkdir(parents=True)
    (build / "kernels" / "forward.o").touch()

    def modules(folder: str = "build/lib") -> set[str]:
        command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", folder]
        subprocess.run(command, cwd=source, check=True, capture_output=True)
        return {path.name for path in (source / folder / "gralora_ext").iterdir()}

    assert "gone.py" in modules()
    (source / "gralora_ext" / "gone.py").unlink()
    assert modules() == {"__init__.py", "_build_config.py", "_build_cuda.py"}
    assert (build / "kernels" / "forward.o").exists()
    assert "__init__.py" in modules(".")


def test_public_names_are_there() -> None:
    for name in gralora_ext.__all__:
        assert name in dir(gralora_ext)
        assert getattr(gralora_ext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gralora_ext.nothing


def test_build_info_tells_what_is_in_use() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        info = gralora_ext.build_info()
    finally:
        torch.set_num_threads(before)
    assert info["problem"] is None
    assert info["version"] == gralora_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["torch_built_with"].split("+")[0].split(".")[:2] == torch.__version__.split("+")[0].split(".")[:2]
    assert info["build"] in ("prebuilt", "jit") and Path(info["path"]).is_file()
    assert info["cpu_capability"] in info["compiled_capabilities"]
    assert info["compiled_capabilities"][0] == "default"
    assert info["threads"] == 1
    assert all(re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", arch) for arch in info["cuda_archs"])
    assert info["peft"] and info["compiler"].startswith("gcc ")


@pytest.mark.parametrize("amx", ["auto", "0"])
def test_amx_is_used_where_the_processor_has_it_and_the_environment_lets(amx: str) -> None:
    processor = Path("/proc/cpuinfo")
    words = set(processor.read_text().split()) if processor.exists() else set()
    code = "from gralora_ext import build_info as b; print(b()['cpu_amx'], b()['cpu_capability'], b()['compiler'])"
    used, capability, _, version = run_python(code, GRALORA_EXT_CPU_AMX=amx).split()[:4]
    has = {"amx_tile", "amx_bf16", "avx512_bf16"} <= words and capability == "avx512"
    assert used == str(amx == "auto" and has and int(version.split(".")[0]) >= 11)
