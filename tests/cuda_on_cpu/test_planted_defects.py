"""The tests can fail: each defect is planted in a copy of the kernels, and caught, by results or by ThreadSanitizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import compilers
import pytest
import torch
from emulated import EmulatorError, Library
from helpers import Case
from test_kernels import CSRC, HERE, Way, check, check_infinity, check_mask, check_merge

pytestmark = pytest.mark.skipif(
    compilers.find_toolkit() is None or compilers.compiler() is None, reason="needs CUDA's headers and g++"
)

# What is planted, in which file, what is replaced (once) by what
DEFECTS = {
    "no barrier before a stage of x is read": (
        "project.cuh",
        "    sync_block();  // this stage has landed for all, and all are done with the one that is filled next\n",
        "",
    ),
    "a wait that leaves the stage in flight": ("project.cuh", "cp_async_wait<Tile::kStages - 2>", "cp_async_wait<Tile::kStages - 1>"),
    "P is written to the buffer that is read": ("project.cuh", "store_factor(1 - buffer)", "store_factor(buffer)"),
    "a row too many of x": ("project.cuh", "t0 + m < ranks.T && left", "t0 + m <= ranks.T && left"),
    "no zeros beyond the end of a row": (
        "project.cuh",
        "inside ? 16 : 0",
        "16",
    ),
    "a rank too many": ("project.cuh", "rank < ranks.r + ranks.h)", "rank <= ranks.r + ranks.h)"),
    "splits that overlap": ("project.cuh", "first = chunks * split / splits", "first = chunks * split / (splits + 1)"),
    "no scaling in project": ("project.cuh", "scale * acc[c][v]", "acc[c][v]"),
    "x is not dropped": ("project.cuh", "if (mask.seed != nullptr)", "if (false)"),
    "no barrier after dropout": ("project.cuh", "tid, kThreads);\n      sync_block();", "tid, kThreads);"),
    "rows and columns of a fragment swapped": (
        "fragments.cuh",
        "(lane / 4 + v % 2 * 8) * pitch + lane % 4 * 2 + v / 2 * 8",
        "(lane / 4 + v / 2 * 8) * pitch + lane % 4 * 2 + v % 2 * 8",
    ),
    "a transposed fragment with its quarters swapped": (
        "fragments.cuh",
        "(lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8",
        "(lane / 8 % 2 * 8 + lane % 8) * pitch + lane / 16 * 8",
    ),
    "neighbouring column tiles swapped": ("fragments.cuh", "right[0][0] = word[2]", "right[0][0] = word[3]"),
    "no second piece": ("pieces.cuh", "x = rest - rest == 0.0f ? rest : 0.0f;", "x = 0.0f;"),
    "a pair of pieces left out": ("pieces.cuh", "sum = kLevel - 1;", "sum = kLevel - 2;"),
    "no block exchange": ("geometry.cuh", "at(s, t, c / rb) + j * rb + c % rb", "at(s, t, j) + c"),
    "only the first split is read": ("geometry.cuh", "for (int s = 0; s < splits; s++) sum +=", "for (int s = 0; s < 1; s++) sum +="),
    "the general part of one block": ("geometry.cuh", "n < k; n++", "n < 1; n++"),
    "the general part is kept a block further": ("geometry.cuh", "store_global(u + t * (int64_t(k) * r + h) + (c < r ? j : k - 1)", "store_global(u + t * (int64_t(k) * r + h) + (c < r ? j : k)"),
    "the ranks of another block of A": ("geometry.cuh", "return int(row / block_rows) * rb;", "return 0;"),
    "no barrier before base is read": ("expand.cuh", "    sync_block();  // base has landed for all\n", ""),
    "no barrier before y is stored": (
        "expand.cuh",
        "    sync_block();\n    if (mask.seed != nullptr) {  // y is dx",
        "    if (mask.seed != nullptr) {  // y is dx",
    ),
    "no scaling in expand": ("expand.cuh", "scale * value", "value"),
    "columns of the next block are written": ("expand.cuh", "e < kVector && e < left; e++) store", "e < kVector; e++) store"),
    "columns of the next block are read": ("expand.cuh", "column0 + o < w)", "column0 + o <= w)"),
    "nine rounds of Philox": ("mask.cuh", "round < 10", "round < 9"),
    "a counter that is not advanced": ("mask.cuh", "first / 8 + 1", "first / 8"),
    "an element index in 32 bits": ("mask.cuh", "uint64_t(t) * uint64_t(width)", "uint64_t(uint32_t(t) * uint32_t(width))"),
    "no barrier between tokens": ("weight_gradient.cuh", "    sync_block();  // this stage has landed for all, and all are done with the one that is filled next\n", ""),
    "no scaling of a gradient": ("weight_gradient.cuh", "side.scale * acc[c][v]", "acc[c][v]"),
    "sums beyond the block's columns": ("weight_gradient.cuh", "rank < all_ranks && column < side.w", "rank < all_ranks"),
    "the second pass forgets a split": ("reduce.cuh", "split < splits", "split < splits - 1"),
    "a gradient of the general part at the block's rank": ("reduce.cuh", "side.general.set(n, c - side.r,", "side.general.set(n, c,"),
    "kept elements are not scaled": ("tensor_cores.cuh", "1.0 / (1.0 - d.p)", "1.0"),
    "B is not transposed": ("tensor_cores.cuh", "project<X, P>(p.grad_y, transposed(p.adapter.B)", "project<X, P>(p.grad_y, p.adapter.B"),
}  # fmt: skip
RACE_CALL = "130 66 290 2 12 5 0 0 2 2 30 2 7 0"


def battery(library: Library) -> None:
    """A few cases that together reach every line of the kernels."""
    single, mixed = (torch.float32,) * 3, (torch.bfloat16, torch.bfloat16, torch.float32)
    check(library, Case((131,), 2, 72, 88, 6, 5, *mixed), Way(3, 2, 0.3))
    check(library, Case((70,), 3, 11, 150, 4, 2, *single), Way(1, 2, 0.3))
    check(library, Case((129,), 2, 64, 130, 16, 0, *single), Way(2, 3))
    check_merge(library, Case((1,), 3, 22, 150, 4, 3), torch.float32)
    check_mask(library)
    check_infinity(library)


def planted(folder: Path, file: str, old: str, new: str) -> Path:
    kernels = folder / "csrc" / "cuda"
    shutil.copytree(CSRC / "cuda", kernels)
    text = (kernels / file).read_text()
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times: the defect must be planted anew"
    (kernels / file).write_text(text.replace(old, new))
    return kernels


def found(kernels: Path) -> str:
    """What catches a defect: a result, an error of the emulator, or ThreadSanitizer; else the empty string."""
    library = Library(compilers.emulated_library(HERE / "kernels.cu", include=[CSRC], kernels=kernels))
    try:
        battery(library)
    except (AssertionError, EmulatorError) as error:
        return f"{type(error).__name__}: {error}"
    sources = [HERE / "kernels_main.cpp", HERE / "kernels.cu"]
    done = compilers.run(
        compilers.emulated_program(sources, "tsan", include=[CSRC], kernels=kernels), *RACE_CALL.split()
    )
    return done.stderr if done.returncode else ""


def test_without_a_defect_nothing_is_found() -> None:
    assert found(CSRC / "cuda") == ""


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_caught(name: str, tmp_path: Path) -> None:
    assert found(planted(tmp_path, *DEFECTS[name])) != ""
