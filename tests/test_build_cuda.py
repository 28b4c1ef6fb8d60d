# SPDX-License-Identifier: Apache-2.0
"""What is compiled for CUDA, and for which devices: decisions that need no GPU, and no toolkit but a stand-in for nvcc."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from gralora_ext import _build_config as config
from gralora_ext import kernels

cuda = config.cuda
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """Version 13.0, which knows the devices from 7.5 on."""
    root = tmp_path / "a toolkit"
    (root / "bin").mkdir(parents=True)
    (root / "include").mkdir()
    (root / "lib64").mkdir()
    (root / "include" / "cuda_runtime.h").touch()
    nvcc = root / "bin" / "nvcc"
    known = " ".join(f"compute_{n}" for n in (75, 80, 86, 87, 89, 90, 100, 120))
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --list-gpu-arch) printf "%s\\n" {known};; *) echo "Cuda compilation tools, release 13.0, V13.0.88";; esac\n'
    )
    nvcc.chmod(0o755)
    return root


def test_every_cuda_source_is_listed_once() -> None:
    assert sorted(cuda.SOURCES) == sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu"))
    assert set(cuda.PORTABLE) < set(cuda.SOURCES)


def test_kernels_include_no_torch_header() -> None:
    for path in (ROOT / "csrc" / "cuda").iterdir():
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in includes if any(word in line for word in ("torch", "ATen", "c10"))]


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "found", "wanted"),
    [
        ("auto", "13.0", True, True),
        ("auto", None, True, False),
        ("auto", "13.0", False, False),
        ("0", "13.0", True, False),
        ("1", "13.1", True, True),
        ("1", None, True, True),
    ],
)
def test_cuda_is_built_where_torch_and_toolkit_have_it_or_it_is_asked_for(
    setting: str, torch_cuda: str | None, found: bool, wanted: bool, toolkit: Path
) -> None:
    assert cuda.wanted(setting, "2.13.0+cpu", torch_cuda, toolkit if found else None) is wanted


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "found", "message"),
    [
        ("1", "13.0", False, "no CUDA toolkit"),
        ("1", None, False, "no CUDA toolkit"),
        ("auto", "12.8", True, "is 13.0, but this torch was built for CUDA 12.8"),
        ("yes", "13.0", True, "must be auto, 0 or 1, but it is 'yes'"),
    ],
)
def test_cuda_that_cannot_be_built_is_refused_in_one_sentence(
    setting: str, torch_cuda: str | None, found: bool, message: str, toolkit: Path
) -> None:
    with pytest.raises(config.BuildError, match=message) as error:
        cuda.wanted(setting, "2.13.0+cpu", torch_cuda, toolkit if found else None)
    assert "`" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "present", "expected"),
    [
        ("", [], ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]),
        ("", ["9.0"], ["9.0+PTX"]),
        ("", ["10.0", "8.9", "8.9"], ["8.9", "10.0+PTX"]),
        ("8.0;9.0+PTX", ["12.0"], ["8.0", "9.0+PTX"]),
        (" 8.6 12.0 ", [], ["8.6", "12.0"]),
        ("", ["99.0"], ["12.0+PTX"]),  # newer than nvcc
        ("", ["8.9", "99.0"], ["8.9+PTX"]),
    ],
)
def test_devices_are_those_asked_for_or_present_or_all(
    asked: str, present: list[str], expected: list[str], toolkit: Path
) -> None:
    assert cuda.capabilities(asked, present, toolkit) == expected


@pytest.mark.parametrize("asked", ["Hopper", "9", "9.0+SASS", "6.1", "8.0,9.0"])
def test_a_device_that_nvcc_does_not_know_is_refused(asked: str, toolkit: Path) -> None:
    with pytest.raises(config.BuildError, match="TORCH_CUDA_ARCH_LIST holds '.*`unset TORCH_CUDA_ARCH_LIST`"):
        cuda.capabilities(asked, [], toolkit)


def test_tensor_core_kernels_are_compiled_for_the_devices_that_have_them(toolkit: Path) -> None:
    for source in cuda.SOURCES:
        line = " ".join(cuda.command(source, ["7.5", "8.0", "12.0+PTX"], toolkit, ROOT / "csrc", ["c++"]))
        assert ("arch=compute_75,code=sm_75" in line) == (source in cuda.PORTABLE)
        for code in ("sm_80", "sm_120", "compute_120"):
            assert f"arch=compute_{code.split('_')[1]},code={code}" in line
        assert ",code=sm_80" in " ".join(cuda.command(source, ["8.0"], toolkit, ROOT / "csrc", ["c++"]))


NAMES = (
    "7.5",
    "7.5+PTX",
    "8.0",
    "8.0+PTX",
    "8.6",
    "8.9+PTX",
    "9.0",
    "9.0a",
    "9.0a+PTX",
    "10.0f+PTX",
    "10.0",
    "12.0+PTX",
)
CARDS = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]


def runs(code: str, card: tuple[int, int]) -> bool:
    """By NVIDIA's rules of compatibility"""
    kind, major, minor, suffix = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code).groups()
    version = int(major), int(minor)
    if suffix == "a":
        return version == card
    return version <= card and (version[0] == card[0] or (kind == "compute" and suffix == ""))


def codes(source: str, names: list[str], toolkit: Path) -> list[str]:
    line = cuda.command(source, names, toolkit, ROOT / "csrc", ["c++"])
    return re.findall(r"arch=compute_\w+,code=(\w+)", " ".join(line))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_card_that_is_covered_finds_the_code_of_all_kernels_that_it_is_given(count: int, toolkit: Path) -> None:
    """launch.cu gives a card of 8.0 or later the kernels on tensor cores."""
    for names in map(list, itertools.combinations(NAMES, count)):
        portable, others = (codes(f"csrc/cuda/{name}.cu", names, toolkit) for name in ("launch", "bfloat16"))
        for card in CARDS:
            covered = any(kernels._covers(name, card) for name in names)
            assert covered == any(runs(code, card) for code in portable), (names, card)
            assert not covered or card < (8, 0) or any(runs(code, card) for code in others), (names, card)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["7.5+PTX"], ["compute_80"]),
        (["7.5+PTX", "8.0+PTX"], ["compute_80", "sm_80"]),
        (["7.5", "9.0a+PTX"], ["sm_90a", "compute_90a"]),
        (["7.0", "7.5"], ["compute_80"]),  # which no card is given: it defines what launch.cu calls
    ],
)
def test_each_code_of_the_tensor_core_kernels_is_made_once(
    names: list[str], expected: list[str], toolkit: Path
) -> None:
    assert codes("csrc/cuda/bfloat16.cu", names, toolkit) == expected


def test_one_cuda_runtime_in_a_process(toolkit: Path) -> None:
    assert "-lcudart" in cuda.link_flags("2.13.0", "13.0", toolkit)
    assert str(toolkit / "lib64" / "libcudart_static.a") in cuda.link_flags("2.13.0+cpu", None, toolkit)


def test_the_runtime_of_pips_packages_is_linked_by_its_full_name(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart.so.13").touch()
    assert cuda.link_flags("2.13.0", "13.0", tmp_path) == [f"-L{tmp_path / 'lib'}", "-l:libcudart.so.13"]
    (tmp_path / "lib" / "libcudart.so").touch()
    assert cuda.link_flags("2.13.0", "13.0", tmp_path) == [f"-L{tmp_path / 'lib'}", "-lcudart"]


@pytest.mark.parametrize(
    ("version", "old"), [("2.7.1+cu126", True), ("2.10.0", True), ("2.11.0", False), ("3.0.0a0", False)]
)
def test_an_old_torch_gives_streams_by_its_headers_for_cuda(version: str, old: bool, toolkit: Path) -> None:
    assert ("-lc10_cuda" in cuda.link_flags(version, "13.0", toolkit)) == old
    assert ("-DGRALORA_CUDA_STREAM_HEADER" in cuda.glue_flags(version, toolkit)) == old
    if old:
        with pytest.raises(config.BuildError, match="needs torch 2.11 or newer, and this is"):
            cuda.wanted("1", version, None, toolkit)


def test_the_toolkit_that_is_named_is_taken(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    cuda.find_toolkit.cache_clear()
    assert cuda.find_toolkit() == toolkit
    monkeypatch.setenv("CUDA_HOME", str(toolkit / "bin"))
    cuda.find_toolkit.cache_clear()
    assert cuda.find_toolkit() is None
    monkeypatch.undo()
    cuda.find_toolkit.cache_clear()
