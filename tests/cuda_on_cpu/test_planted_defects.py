# SPDX-License-Identifier: Apache-2.0
"""The tests can fail: each defect is planted in a copy of the kernels, and caught by one of the tools."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import compilers
import pytest
import torch
from checks import CHOSEN, Way, check, check_choices, check_far, check_infinity, check_mask, check_memory, check_merge
from emulated import EmulatorError, Library
from helpers import Case
from planted import DEFECTS

pytestmark = pytest.mark.skipif(
    compilers.find_toolkit() is None or compilers.compiler() is None, reason="needs CUDA's headers and g++"
)

# On tensor cores: by single elements, and by vectors, with more chunks of columns and of tokens
# than a ring has stages, and more tiles of y than a block holds; more ranks than are multiplied at
# once. And by the plain kernels.
RACE_CALLS = (
    "130 66 290 2 12 5 0 0 2 2 30 2 7 0",
    "161 328 200 1 16 0 1 0 1 1 30 2 7 0",
    "20 33 145 1 70 0 0 0 1 1 0 2 7 0",
    "70 40 130 2 4 3 1 2 0 0 30 2 7 0",
)
HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
TABLE = HERE / "tables" / "defects.md"
# The first of each file of the kernels: a defect takes half a minute of a core.
FEW = [*{file: name for name, (file, _, _) in reversed(DEFECTS.items())}.values()]


def battery(library: Library) -> None:
    """A few cases that together reach every line of the kernels."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    check(library, Case((131,), 2, 136, 88, 6, 5, bf16, bf16, f32), Way(3, 2, 0.3))
    check(library, Case((70,), 3, 11, 150, 4, 2, f32, f32, f32), Way(1, 2, 0.3))
    check(library, Case((129,), 2, 64, 136, 16, 0, bf16, bf16, f32), Way(2, 3, 0.3, keep_u=False, padding=3))
    assert library.statistics().wavefronts == library.statistics().least_wavefronts, "bank conflicts"
    check(library, Case((131,), 2, 136, 72, 32, 5, bf16, bf16, f32), Way(dropout=0.3, add_to_dx=True))
    check_merge(library, Case((1,), 3, 22, 150, 4, 3), f32)
    check_merge(library, Case((1,), 4, 40, 32, 6, 3), bf16)
    check_merge(library, Case((1,), 4, 40, 32, 6, 3), bf16, "columns")
    check(
        library, Case((200,), 3, 70, 65, 4, 2, bf16, bf16, f16), Way(0, 0, 0.3, keep_u=False, padding=3, add_to_dx=True)
    )
    check(library, Case((20,), 2, 24, 24, 2, 0, bf16, f32, f32), Way(0, 0, keep_u=False))
    check(library, Case((20,), 2, 24, 24, 2, 0, f32, torch.float64, f32), CHOSEN)
    check_merge(library, Case((1,), 2, 40, 32, 6, 2), bf16, "neither")
    check_mask(library)
    check_infinity(library)
    check_choices(library)
    check_memory(library)
    check_far(library)
    library.truncate(True)
    check(library, Case((16,), 1, 4160, 64, 16, 0, f32, f32, f32), Way())
    check(library, Case((4096,), 1, 16, 16, 16, 0, bf16, bf16, f32), Way())
    check(library, Case((16,), 1, 64, 64, 1024, 0, f32, f32, f32), Way())
    library.truncate(False)


def planted(folder: Path, file: str, old: str, new: str) -> Path:
    kernels = folder / "csrc" / "cuda"
    shutil.copytree(CSRC / "cuda", kernels)
    text = (kernels / file).read_text()
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times: the defect must be planted anew"
    (kernels / file).write_text(text.replace(old, new))
    return kernels


def build_in(folder: str) -> None:
    """Nobody needs these builds again."""
    os.environ["XDG_CACHE_HOME"] = folder


def found(kernels: Path) -> str:
    """What catches a defect: "emulator" (an access, a wait, an alignment), "results" or "TSan"; or nothing."""
    library = Library(compilers.emulated_library(HERE / "kernels.cu", "quick", include=[CSRC], kernels=kernels))
    try:
        battery(library)
    except EmulatorError:
        return "emulator"
    except AssertionError:
        return "results"
    sources = [HERE / "kernels_main.cpp", HERE / "kernels.cu"]
    program = compilers.emulated_program(sources, "quick_tsan", include=[CSRC], kernels=kernels)
    return "TSan" if any(compilers.run(program, *call.split()).returncode for call in RACE_CALLS) else ""


def table(caught: dict[str, str]) -> str:
    rows = [f"| {name} | `{DEFECTS[name][0]}` | {caught[name]} |" for name in DEFECTS]
    return "\n".join(["| planted | in | caught by |", "| --- | --- | --- |", *rows]) + "\n"


@pytest.fixture(scope="module")
def catch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Iterable[str]], dict[str, str]]]:
    """Tells by which tool each of the named defects is caught; tries those that have not been tried."""
    folder = tmp_path_factory.mktemp("planted")
    spawn = multiprocessing.get_context("spawn")
    caught: dict[str, str] = {}
    with ProcessPoolExecutor(os.cpu_count(), spawn, build_in, (str(folder),)) as pool:

        def catch(names: Iterable[str]) -> dict[str, str]:
            new = [name for name in names if name not in caught]
            copies = [planted(folder / str(list(DEFECTS).index(name)), *DEFECTS[name]) for name in new]
            caught.update(zip(new, pool.map(found, copies), strict=True))
            return caught

        yield catch


def test_without_a_defect_nothing_is_found() -> None:
    assert found(CSRC / "cuda") == ""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.exhaustive) for name in DEFECTS]
)
def test_a_planted_defect_is_caught(name: str, catch: Callable[[Iterable[str]], dict[str, str]]) -> None:
    assert catch(FEW if name in FEW else DEFECTS)[name] != ""


@pytest.mark.exhaustive
def test_the_table_tells_what_catches_what(catch: Callable[[Iterable[str]], dict[str, str]]) -> None:
    caught = catch(DEFECTS)
    assert TABLE.read_text().endswith(table(caught)), f"{TABLE.name} must end with:\n{table(caught)}"


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_can_be_planted(name: str, tmp_path: Path) -> None:
    """In the kernels as they are: what is replaced is there, once."""
    planted(tmp_path / "copy", *DEFECTS[name])
