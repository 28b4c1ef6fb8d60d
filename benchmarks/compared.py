# SPDX-License-Identifier: Apache-2.0
"""The tables of what ``gralora-ext compare`` and ``gralora-ext analyze`` left in the committed results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gralora_ext.compare.page import cells
from gralora_ext.compare.summary import Spread

from .results import markdown, read_json, when

COMPARED = "compare"  # the folder with the committed comparison; analyses lie in analyze-rank and so on
ANALYSES = ("rank", "outlier", "grid")


def tables(folder: Path) -> dict[str, Callable[[Path], str]]:
    """Of what is committed in ``folder``, the functions that make a table of it, by name."""
    found: dict[str, Callable[[Path], str]] = {}
    if (folder / COMPARED / "summary.json").exists():
        found["methods"] = methods
    for what in ANALYSES:
        if (folder / f"analyze-{what}" / f"{what}.json").exists():
            found[what] = partial(findings, what=what)
    return found


def methods(folder: Path) -> str:
    """The comparison's table, with what follows from it."""
    content = read_json(folder / COMPARED / "summary.json")
    table = [["method", "learning rate", "seeds", *(f"{m['label']} ({m['unit']})" for m in content["metrics"])]]
    table += [[row["label"], *cells(row)] for row in content["rows"]]
    s = content["settings"]
    sizes = (
        f"`gralora-ext compare{' --quick' if s['quick'] else ''}`: {s['model'].split(' (')[0]} on {s['data']}, "
        f"{s['steps']} steps of {s['batch_size']} rows of at most {s['max_length']} tokens, rank {s['rank']}, "
        f"{s['test_rows']} test rows; mean ± standard deviation over seeds."
    )
    busy = ["In some runs threads had to wait for a core, so that their speeds are too low, and not comparable."]
    said = content["sentences"] + (busy if content["busy"] else [])
    return "\n\n".join([sizes, markdown(table), *said, _measured(folder / COMPARED)])


def findings(folder: Path, what: str) -> str:
    """An analysis: what the paper says, what was measured, and the sentence that follows."""
    content = read_json(folder / f"analyze-{what}" / f"{what}.json")
    table = [["the paper", "its number", "ours", "verdict"]]
    table += [[f["claim"], f["paper"], f["ours"], f["sentence"]] for f in content["findings"]]
    s = content["settings"]
    sizes = (
        f"`gralora-ext analyze {what}{' --quick' if s['quick'] else ''}`: {s['model'].split(' (')[0]}, {s['steps']} steps of "
        f"{s['batch_size']} rows, {s['seeds']} seeds."
    )
    more = _steps(content["steps"]) if "steps" in content else []
    return "\n\n".join([sizes, markdown(table), *more, _measured(folder / f"analyze-{what}")])


def _steps(steps: dict[str, Any]) -> list[str]:
    """Of the outlier's analysis: what a step on A alone and one on B alone give."""
    heads = {
        "cosine_of_a": "cosine of a step on A",
        "cosine_of_b": "cosine of a step on B",
        "size_of_a": "how far A's step moves ΔW, as a part of B's",
    }
    table = [["k", *heads.values()]]
    table += [[k, *(Spread(tuple(steps[what][k]["values"])).text(3) for what in heads)] for k in steps["cosine_of_a"]]
    return ["The same direction, taken apart into a step on A alone and one on B alone:", markdown(table)]


def _measured(folder: Path) -> str:
    """With what and where the runs in ``folder`` were made, which may be of several days and commits."""
    made = sorted((read_json(file) for file in (folder / "runs").glob("*.json")), key=lambda run: run["date"])
    return f"Measured with {'; '.join(dict.fromkeys(map(_place, made)))}."


def _place(made: dict[str, Any]) -> str:
    versions = made["versions"]
    place = f"{made['machine']['cpu']}, {made['threads']} threads"
    return f"torch {versions['torch']}, PEFT {versions['peft']}: {place}, {when(made)}"
