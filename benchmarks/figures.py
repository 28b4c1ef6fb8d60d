# SPDX-License-Identifier: Apache-2.0
"""The tables of the documents, by name, from the committed results.

A run's folder is named by its processor, such as ``zen-5``, or ``zen-5+kept`` for a second run
beside it. A contender that a run did not measure is "not measured" there, and has no column where
no run measured it.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gralora_ext.program.errors import JobError

from . import jobs, results
from .results import LABELS, markdown, same, when

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PASSES = {"forward": "forward", "forward + backward": "training"}  # of the path, and their benches
PEERS = ("peft", "peft-compiled", "lora", "torch")
NOT_MEASURED = "not measured"

# Runs from before 2026-11-29 have no ``settings.malloc``. These benches told malloc to keep freed
# memory then, and no other did. The kernels have changed much since.
KEPT_BEFORE = ("step", "layers")
BACK = "freed memory going back to the system (which favours ours)"

Record = dict[str, Any]
Rows = list[list[str]]


@dataclass(frozen=True, eq=False)
class Run:
    """A committed run: where it lies, and the content of its file."""

    folder: str
    content: dict[str, Any]

    @property
    def processor(self) -> str:
        """The card, or the processor with its folder's name, since virtual machines hide the model."""
        machine = self.content["machine"]
        cpu = re.sub(r"[(]R[)]| Processor", "", machine["cpu"])
        name = self.folder.split("+")[0].replace("-", " ").capitalize()
        return machine["gpu"] or (cpu if name in cpu else f"{cpu} ({name})")

    @property
    def source(self) -> str:
        """Where it was measured, on which commit and day."""
        return f"{self.processor}, {when(self.content)}"

    def settings(self, bench: str) -> str:
        settings, versions = self.content["settings"], self.content["versions"]
        malloc = f"malloc {settings.get('malloc', 'keeps freed memory')}"
        return (
            f"{settings['threads']} threads (more were not measured), torch {versions['torch']}, "
            f"PEFT {versions['peft']}, {BACK if self.old and bench not in KEPT_BEFORE else malloc}"
        )

    @property
    def old(self) -> bool:
        """From before 2026-11-29."""
        return "malloc" not in self.content["settings"]

    def records(self, *benches: str, what: str | None = None) -> list[Record]:
        return [r for r in self.content["records"] if r["bench"] in benches and what in (None, r["case"].get("what"))]


class Tables:
    """The tables of the runs in ``folder``, by processor."""

    def __init__(self, folder: Path):
        self.folder = folder
        found = [Run(file.parent.name, results.load(file)) for file in sorted(folder.glob(f"*/{results.FILE}"))]
        self.runs = [run for run in reversed(found) if run.content["complete"]]
        if not self.runs:
            raise JobError(f"{folder}: there is no complete run in it")

    def step(self) -> str:
        """A training step, and in one sentence what it costs beside the others."""
        return self._seconds("step", "A training step of SmolLM2-135M")

    def layers(self) -> str:
        """The adapted layers of the model alone, which a machine's other users disturb less."""
        return self._seconds("layers", "Training all adapted layers of SmolLM2-135M, one after another")

    def _seconds(self, bench: str, subject: str) -> str:
        cases = {run: run.records(bench, what=bench) for run in self._with(bench)}
        records = [r for of_run in cases.values() for r in of_run]
        names = [n for n in LABELS if any(n in r["contenders"] for r in records)]
        facts = any("loss" in entry for r in records for entry in r["contenders"].values())
        peers = ("base", "peft", "lora")
        ratios = (f"ours / {LABELS[n]}" for n in peers)
        rows = [["processor", "adapter", "rounds", *ratios, *(f"{LABELS[n]}, ms" for n in names)]]
        for run, of_run in cases.items():
            for r in of_run:
                row = [run.processor, r["case"]["setting"], str(r["contenders"]["ours"]["rounds"])]
                rows.append(row + [_mean(_ratios([r], n)) for n in peers] + [_milliseconds(r, n) for n in names])
        spread, tokens = _spread([records]), same(f"{bench}: tokens", (r["case"]["tokens"] for r in records))
        sentence = (
            f"{subject} in float32, {tokens} tokens, forward + backward: how much of the others' time ours takes "
            f"(the rounds' median ratios), and medians in ms{' (loss; gradient norm)' if facts else ''}, "
            f"interquartile ranges up to {spread:.0%}:"
        )
        return self._page(bench, sentence, rows, list(cases))

    def path(self) -> str:
        """The path alone, more than one token: how many times as fast as each peer."""
        runs = self._with("forward", "training")
        rows = self._beside(runs, {what: partial(_path, bench, False) for what, bench in PASSES.items()})
        return self._page(
            "forward", f"More than one token, how many times as fast our layer is as each: {MEANS}.", rows, runs
        )

    def one_token(self) -> str:
        """T = 1: the path alone, and what a layer adds to its base layer."""
        runs = self._with("forward", "training", "inference")
        passes = {what: partial(_path, bench, True) for what, bench in PASSES.items()}
        passes["what a layer adds to its base layer"] = lambda run: run.records("inference", what="overhead")
        rows = self._beside(runs, passes)
        return self._page("forward", f"One token, how many times as fast our layer is as each: {MEANS}.", rows, runs)

    def merge(self) -> str:
        """Merging: speed beside PEFT's, and the memory that it takes beside the weight."""
        runs, peers, measured = self._with("merge"), ("peft", "lora"), ("ours", "peft", "lora")
        rows = [["processor", "pass", "cases", *(f"beside {LABELS[n]}" for n in (*peers, "ours-plain"))]]
        rows[0] += [f"extra MiB, {LABELS[n]}" for n in measured]
        for run, codes, what in itertools.product(runs, (True, False), ("merge", "unmerge")):
            if not (records := _merges(run, what, codes)):
                continue
            row = [run.processor, f"{what} {'with' if codes else 'without'} codes", str(len(records))]
            row += [*(_times(records, n) for n in peers), _times(records, "ours-plain") if codes else ""]
            peaks = [r["contenders"] for r in run.records("merge", what="peak")] if what == "merge" else []
            if not codes and _merges(run, what, codes=True):  # the peak of ours is that of a merge with codes
                peaks = [{n: p[n] for n in peers} for p in peaks]
            row += [_mebibytes([p[n]["median"] for p in peaks if n in p]) for n in measured]
            rows.append(row)
        text = (
            f"How many times as fast our layer is as each: {MEANS}; and the peak of memory beside the weight. "
            f"Where a run measured merges with codes and without, the latter's ratios are those of the medians."
        )
        return self._page("merge", text, rows, runs)

    def kept(self) -> str:
        """What a layer keeps alive for backward, x included."""
        runs = self._with("memory", what="kept")
        names = ("ours", "peft", "lora", "base")
        rows = [["MiB", *(LABELS[n] for n in names)]]
        for run in runs:
            for r in run.records("memory", what="kept"):
                rows.append([_case(r), *(_mebibytes([r["contenders"][n]["median"]]) for n in names)])
        text = "Kept alive for backward by a whole layer beside its weights, x included: a frozen layer alone does not keep it."
        return self._page("memory", text, rows, runs)

    def mixed(self) -> str:
        """Batches in which each row has its adapter, beside LoRA and the model without one."""
        runs = self._with("mixed")
        rows = [["processor", "adapters", "rows of an adapter", "beside frozen", "beside PEFT's LoRA"]]
        for run in runs:
            for r in run.records("mixed"):
                case, ratios = r["case"], r["ratios"]
                one_each = case["adapters"] == case["rows"]  # together and in turns are the same batch then
                if one_each and case["order"] != "together":
                    continue
                order = "one each" if one_each else case["order"]
                rows.append(
                    [run.processor, str(case["adapters"]), order, *(f"{ratios[n]:.2f}" for n in ("base", "lora"))]
                )
        cases = [r["case"] for run in runs for r in run.records("mixed")]
        number, T, N = (same(f"mixed: {key}", (case[key] for case in cases)) for key in ("rows", "T", "N"))
        text = (
            f"Time of a batch of {number} rows of {T // number} tokens through four layers of width "
            f"{N}, as a part of the others' time (medians of the rounds' ratios; the times' interquartile "
            f"ranges are up to {_spread(run.records('mixed') for run in runs):.0%}):"
        )
        return self._page("mixed", text, rows, runs)

    def _with(self, *benches: str, what: str | None = None) -> list[Run]:
        """Of each processor the newest run that has records of all these benches."""
        newest: dict[str, Run] = {}
        for run in sorted(self.runs, key=lambda run: run.content["date"]):
            if all(run.records(bench, what=what) for bench in benches):
                newest[run.folder.split("+")[0]] = run
        if not newest:
            raise JobError(f"{self.folder}: no run in it has the bench {' or '.join(benches)}")
        return [run for run in self.runs if run in newest.values()]

    def _beside(self, runs: list[Run], passes: dict[str, Callable[[Run], list[Record]]]) -> Rows:
        """A row for each run and pass: the ratios to each peer."""
        cases = [(run, name, of_run(run)) for run in runs for name, of_run in passes.items()]
        peers = [n for n in PEERS if any(_ratios(records, n) for _, _, records in cases)]
        rows = [["processor", "pass", "cases", *(f"beside {LABELS[n]}" for n in peers)]]
        for run, name, records in cases:
            rows.append([run.processor, name, str(len(records)), *(_times(records, n) for n in peers)])
        return rows

    def _page(self, bench: str, sentence: str, rows: Rows, runs: list[Run]) -> str:
        """What the table says, the table, and what it was measured with."""
        of_settings: dict[tuple[str, bool], list[str]] = {}
        for run in runs:
            of_settings.setdefault((run.settings(bench), run.old), []).append(run.source)
        measured = [
            f"Measured with {settings}: {'; '.join(of)}.{' The kernels have changed since.' if old else ''}"
            for (settings, old), of in of_settings.items()
        ]
        return "\n\n".join([sentence, markdown(rows), *measured])


MEANS = "geometric mean (least to greatest) of the rounds' median ratios"
TABLES: dict[str, Callable[[Tables], str]] = {
    "step": Tables.step,
    "layers": Tables.layers,
    "path": Tables.path,
    "one-token": Tables.one_token,
    "kept": Tables.kept,
    "merge": Tables.merge,
    "mixed": Tables.mixed,
    **{name: lambda tables, made=made: made(tables.folder) for name, made in jobs.tables(RESULTS).items()},
}


def _path(bench: str, one_token: bool, run: Run) -> list[Record]:
    return [r for r in run.records(bench) if (r["case"]["T"] == 1) == one_token]


def _merges(run: Run, what: str, codes: bool) -> list[Record]:
    """Merges that keep codes; or those that do not: ``ours-plain``, and ours of runs from before there were codes."""
    records = run.records("merge", what=what)
    coded = [r for r in records if "ours-plain" in r["contenders"]]
    return coded if codes else [_of_plain(r) for r in coded] or records


def _of_plain(record: Record) -> Record:
    """``ours-plain`` in the place of ours. The record has no ratios by round of it: they are those of the medians."""
    medians = {name: entry["median"] for name, entry in record["contenders"].items()}
    return {**record, "ratios": {name: medians["ours-plain"] / medians[name] for name in medians}}


def _ratios(records: Iterable[Record], name: str) -> list[float]:
    """Ours over ``name``, where both were measured."""
    return [r["ratios"][name] for r in records if (r["ratios"].get(name) or 0) > 0]


def _times(records: list[Record], name: str) -> str:
    """How many times as fast as ``name``; in how many cases, where that is not all."""
    values = [1 / ratio for ratio in _ratios(records, name)]
    some = f", {len(values)} of them" if 0 < len(values) < len(records) else ""
    return _range(values) + some


def _range(values: list[float]) -> str:
    span = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return _mean(values) + span


def _mean(values: list[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f}" if values else NOT_MEASURED


def _spread(records: Iterable[Sequence[Record]]) -> float:
    """The greatest interquartile range of a contender's times, as a part of its median."""
    contenders = (c for of_run in records for r in of_run for c in r["contenders"].values())
    return max((c["q3"] - c["q1"]) / c["median"] for c in contenders)


def _milliseconds(record: Record, name: str) -> str:
    entry = record["contenders"].get(name)
    if entry is None:
        return NOT_MEASURED
    facts = "; ".join(f"{entry[fact]:.4g}" for fact in ("loss", "gradient_norm") if fact in entry)
    return f"{entry['median'] * 1e3:,.0f}" + (f" ({facts})" if facts else "")


def _mebibytes(values: list[float]) -> str:
    if not values:
        return ""
    texts = list(dict.fromkeys(f"{value / 2**20:.1f}" for value in (min(values), max(values))))
    return " to ".join(texts)


def _case(record: Record) -> str:
    """The key without its first word, which tells what was measured."""
    return record["key"].split(" ", 1)[1]
