# SPDX-License-Identifier: Apache-2.0
"""What is kept of a measurement, and the JSON file that holds a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gralora_ext.program.errors import JobError
from gralora_ext.program.files import staged, write_json

from .shapes import Work
from .timing import Samples, differences, quartiles, ratio

FILE = "results.json"
FORMAT = 1
OURS = "ours"
UNITS = ("s", "bytes")
LABELS = {  # the contenders as plots and tables name them
    "base": "frozen",
    "ours": "ours",
    "ours-op": "ours, the operation alone",
    "ours-path": "ours, base layers called",
    "ours-plain": "ours that keeps nothing",
    "peft": "PEFT's GraLoRA",
    "peft-compiled": "PEFT's GraLoRA, torch.compile",
    "lora": "PEFT's LoRA",
    "torch": "GraLoRA in plain torch",
}


@dataclass(frozen=True)
class Record:
    """One case of a bench: ``samples`` of each contender in ``unit`` ("s" or "bytes"), smaller is better.

    ``errors``: the relative error of each contender against float64, where there is one. ``work``
    is the least work of the case and ``least`` its least seconds on this machine; divided by the
    median that is the share of the roofline. ``facts``: what else is said of a contender, a number
    a name. ``pace``: :meth:`Floor.pace` meanwhile, less than 1 where other users took some of the
    machine.
    """

    bench: str
    key: str
    unit: str
    samples: Samples
    case: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    work: Work | None = None
    least: float | None = None
    pace: float | None = None
    facts: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The record as it stands in the JSON file: quartiles for samples, and ours/peer for every peer."""
        return {
            "bench": self.bench,
            "key": self.key,
            "unit": self.unit,
            "case": self.case,
            "work": asdict(self.work) if self.work else None,
            "least_seconds": self.least,
            "pace": self.pace,
            "contenders": {name: self._contender(name, values) for name, values in self.samples.items()},
            "ratios": {
                name: ratio(self.samples[OURS], values)
                for name, values in self.samples.items()
                if name != OURS and OURS in self.samples
            },
        }

    def _contender(self, name: str, values: list[float]) -> dict[str, Any]:
        q1, median, q3 = quartiles(values)
        return {
            "median": median,
            "q1": q1,
            "q3": q3,
            "rounds": len(values),
            "error": self.errors.get(name),
            "roofline": self.least / median if self.least and median > 0 else None,
            **self.facts.get(name, {}),
        }


def overhead(bench: str, key: str, samples: Samples, case: dict[str, Any], work: Work, least: float) -> Record:
    """The record of what each contender of ``samples`` takes beyond ``base``, round by round."""
    beyond = differences(samples, "base")
    return Record(bench, f"overhead {key}", "s", beyond, {**case, "what": "overhead"}, work=work, least=least)


def save(content: dict[str, Any], folder: Path) -> Path:
    """Writes the run into ``folder``: beside, flushed to disk, then renamed, so that there is never half a file."""
    with staged(folder) as stage:
        write_json(stage / FILE, content)
    return folder / FILE


def load(path: Path) -> dict[str, Any]:
    """A run that :func:`save` wrote; ``path`` is the file or its folder.

    Raises:
        JobError: there is no such file, or it is not of this suite.
    """
    file = path / FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{file} cannot be read as results: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise JobError(f"{file} is not a results file of this suite (format {FORMAT})")
    return content


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise JobError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(read(path))
    except ValueError as error:
        raise JobError(f"{path} cannot be read: {error}") from error


def same(what: str, values: Iterable[Any]) -> Any:
    """The one that all ``values`` are: a table's words must be true of all its rows.

    Raises:
        JobError: they differ.
    """
    first, *others = values
    for other in others:
        if other != first:
            raise JobError(f"{what}: {first!r} and {other!r} differ, and the table tells of one")
    return first


def when(made: dict[str, Any]) -> str:
    """On which commit and day a result was made."""
    git = made["git"]
    commit = (git["commit"] or "not recorded")[:7] + (" with changes" if git["dirty"] else "")
    return f"commit {commit}, {made['date'][:10]}"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *rest = (f"|{'|'.join(row)}|" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])
