# SPDX-License-Identifier: Apache-2.0
"""Comparisons on a tiny model: the same runs as the command makes, in this process, which has the libraries loaded."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import WORDS, call, make_data, make_model

from gralora_ext.compare import runner
from gralora_ext.compare.worker import measured
from gralora_ext.program.files import staged, write_json

OF_SEVERAL_RANKS = (
    *("--model", "model", "--data", "rows.jsonl", "--general-text", "general.txt", "--max-length", 64),
    *("--test-rows", 6, "--validation-rows", 4, "--batch-size", 2, "--steps", 2, "--threads", 1),
)
SMALL = (*OF_SEVERAL_RANKS, "--rank", 8)


def make_work(folder: Path) -> Path:
    """A folder with a model, rows and a general text."""
    make_model(folder / "model")
    make_data(folder / "rows.jsonl", rows=60, times=9)
    text = "\n\n".join(f"It was a {word} in the garden, and nobody knew why." for word in WORDS)
    (folder / "general.txt").write_text(text, encoding="utf-8")
    return folder


def make_here(self: runner.Runner, run: Any) -> None:
    """In place of ``Runner._make``: the run in this process."""
    record = measured(run, self.folder / runner.TEXTS, self.folder)
    with staged(self.folder / runner.RUNS) as stage:
        write_json(stage / f"{record['name']}.json", record)


def command(work: Path, *arguments: object) -> str:
    """What ``gralora-ext`` says, its runs made in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.Runner, "_make", make_here)
        done = call(*arguments, *(OF_SEVERAL_RANKS if "grid" in arguments else SMALL), cwd=work)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "runs").glob("*.json"))]


# Of the committed comparison of a tiny model, which `python tests/compare_helpers.py` makes anew.
TINY = ("--methods", "lora", "gralora-k2", "--lrs", 3e-3, 1e-2, "--seeds", 3, "--extend", 0)


def main() -> None:
    results = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "compare-tiny"
    with tempfile.TemporaryDirectory() as folder:
        work = make_work(Path(folder))
        command(work, "compare", "--output", "out", *TINY)
        shutil.rmtree(results, ignore_errors=True)
        shutil.copytree(work / "out", results, ignore=shutil.ignore_patterns(".lock", "logs", "texts", "compare.*"))


if __name__ == "__main__":
    main()
