# SPDX-License-Identifier: Apache-2.0
"""The tables of what ``gralora-ext compare`` and ``gralora-ext analyze`` left in the committed results."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gralora_ext.program.errors import JobError

from .results import markdown

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
    content = _read(folder / COMPARED / "summary.json")
    metrics = content["metrics"]
    table = [["method", "learning rate", "seeds", *(f"{m['label']} ({m['unit']})" for m in metrics)]]
    for row in content["rows"]:
        rate = "" if row["rate"] is None else f"{row['rate']:g}{' (at the edge)' if row['at_edge'] else ''}"
        values = [row["metrics"].get(m["key"], {}).get("text", "") for m in metrics]
        table.append([row["label"], rate, str(row["seeds"]), *values])
    s = content["settings"]
    sizes = (
        f"`gralora-ext compare{' --quick' if s['quick'] else ''}`: {s['model'].split(' (')[0]} on {s['data']}, "
        f"{s['steps']} steps of {s['batch_size']} rows of at most {s['max_length']} tokens, rank {s['rank']}, "
        f"{s['test_rows']} test rows; mean ± standard deviation over seeds."
    )
    busy = ["Other programs used the machine meanwhile, so that the speeds are too low, and not comparable."]
    said = content["sentences"] + (busy if content["busy"] else [])
    return "\n\n".join([sizes, markdown(table), *said, _measured(content["made"])])


def findings(folder: Path, what: str) -> str:
    """An analysis: what the paper says, what was measured, and the sentence that follows."""
    content = _read(folder / f"analyze-{what}" / f"{what}.json")
    table = [["the paper", "its number", "ours", "verdict"]]
    table += [[f["claim"], f["paper"], f["ours"], f["sentence"]] for f in content["findings"]]
    s = content["settings"]
    sizes = (
        f"`gralora-ext analyze {what}{' --quick' if s['quick'] else ''}`: {s['model'].split(' (')[0]}, {s['steps']} steps of "
        f"{s['batch_size']} rows, {s['seeds']} seeds."
    )
    return "\n\n".join([sizes, markdown(table), _measured(content)])


def _measured(made: dict[str, Any]) -> str:
    git, versions, machine = made["git"], made["versions"], made["machine"]
    commit = (git["commit"] or "not recorded")[:7] + (" with changes" if git["dirty"] else "")
    return (
        f"Measured with torch {versions['torch']}, PEFT {versions['peft']}: {machine['cpu']}, {made['threads']} threads, "
        f"commit {commit}, {made['date'][:10]}."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{path} cannot be read: {error}") from error
