# SPDX-License-Identifier: Apache-2.0
"""The tables of the documents, by name, from the committed results.

A run's folder is named by its processor, such as ``zen-5``, or ``zen-5+kept`` for a second run
beside it. A contender that a run did not measure is "not measured" there, and has no column where
no run measured it.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gralora_ext.program.errors import JobError

from . import compared, results
from .results import LABELS, markdown, read_json, when

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
JOB = "finetune-default"
FOUR_BIT = "finetune-4bit"
FILE_MERGE = "file-merge"
PASSES = {"forward": "forward", "forward + backward": "training"}  # of the path, and their benches
PEERS = ("peft", "peft-compiled", "lora", "torch", "ours-plain")
NOT_MEASURED = "not measured"

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

    @property
    def settings(self) -> str:
        settings, versions = self.content["settings"], self.content["versions"]
        malloc = f"malloc {settings['malloc']}" if "malloc" in settings else "malloc's settings not recorded"
        return (
            f"{settings['threads']} threads (more were not measured), torch {versions['torch']}, "
            f"PEFT {versions['peft']}, {malloc}"
        )

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
        rows = [["processor", "adapter", *(f"ours / {LABELS[n]}" for n in peers), *(f"{LABELS[n]}, ms" for n in names)]]
        for run, of_run in cases.items():
            for r in of_run:
                ratios = (_mean(_ratios([r], n)) for n in peers)
                rows.append([run.processor, r["case"]["setting"], *ratios, *(_milliseconds(r, n) for n in names)])
        spread = _spread([records])
        sentence = (
            f"{subject} in float32, {records[0]['case']['tokens']} tokens, forward + backward: how much of the others' "
            f"time ours takes (medians of the rounds' ratios), and medians in ms{' (loss; gradient norm)' if facts else ''}, "
            f"whose interquartile ranges are up to {spread:.0%}:"
        )
        return self._page(sentence, rows, list(cases))

    def path(self) -> str:
        """The path alone, more than one token: how many times as fast as each peer."""
        runs = self._with("forward", "training")
        rows = self._beside(runs, {what: partial(_path, bench, False) for what, bench in PASSES.items()})
        return self._page(f"More than one token, how many times as fast our layer is as each: {MEANS}.", rows, runs)

    def one_token(self) -> str:
        """T = 1: the path alone, and what a layer adds to its base layer."""
        runs = self._with("forward", "training", "inference")
        passes = {what: partial(_path, bench, True) for what, bench in PASSES.items()}
        passes["what a layer adds to its base layer"] = lambda run: run.records("inference", what="overhead")
        rows = self._beside(runs, passes)
        return self._page(f"One token, how many times as fast our layer is as each: {MEANS}.", rows, runs)

    def merge(self) -> str:
        """Merging: speed beside PEFT's, and the memory that it takes beside the weight."""
        runs = self._with("merge")
        passes = {
            "merge": lambda run: run.records("merge", what="merge"),
            "unmerge": lambda run: run.records("merge", what="unmerge"),
        }
        rows = self._beside(runs, passes)
        rows[0] += [f"extra MiB, {LABELS[n]}" for n in ("ours", "peft", "lora")]
        for row, run in zip(rows[1:], [run for run in runs for _ in range(2)], strict=True):
            peaks = [r["contenders"] for r in run.records("merge", what="peak")] if row[1] == "merge" else []
            row += [_mebibytes([p[n]["median"] for p in peaks if n in p]) for n in ("ours", "peft", "lora")]
            row[1] += " with codes" if "ours-plain" in run.records("merge", what="merge")[0]["contenders"] else ""
        text = f"How many times as fast our layer is as each: {MEANS}; and the peak of memory beside the weight."
        return self._page(text, rows, runs)

    def file_merge(self) -> str:
        """A merge in files, beside copying the files and beside PEFT."""
        found = read_json(self.folder / FILE_MERGE / "measured.json")
        names = {"merge": "`gralora-ext merge`", "cp": "`cp`, which merges nothing", "PEFT": "PEFT: load, merge, save"}
        rows = [["each followed by `sync`", "turns", "median, s (least to greatest)", "GB/s"]]
        for name, label in names.items():
            seconds = found["seconds"][name]
            median = statistics.median(seconds)
            span = f"{median:.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            rows.append([label, str(len(seconds)), span, f"{found['bytes'] / median / 1e9:.2f}"])
        sentence = (
            f"A model of {found['bytes'] / 1e9:.1f} GB in bfloat16 with the shapes of an 8B Llama, r = 32, k = 2, in turns. "
            f"Our process grew by at most {found['growth'] / 2**20:.0f} MiB:"
        )
        where = f"{found['machine']['cpu']}, {found['machine']['cores']} cores of a virtual machine"
        versions = f"torch {found['versions']['torch']}, PEFT {found['versions']['peft']}"
        return f"{sentence}\n\n{markdown(rows)}\n\nMeasured with {versions}: {where}, {when(found)}."

    def kept(self) -> str:
        """What a layer keeps alive for backward, x included."""
        runs = self._with("memory", what="kept")
        names = ("ours", "peft", "lora", "base")
        rows = [["MiB", *(LABELS[n] for n in names)]]
        for run in runs:
            for r in run.records("memory", what="kept"):
                rows.append([_case(r), *(_mebibytes([r["contenders"][n]["median"]]) for n in names)])
        text = "Kept alive for backward by a whole layer beside its weights, x included: a frozen layer alone does not keep it."
        return self._page(text, rows, runs)

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
        case = runs[0].records("mixed")[0]["case"]
        text = (
            f"Time of a batch of {case['rows']} rows of {case['T'] // case['rows']} tokens through four layers of width "
            f"{case['N']}, as a part of the others' time (medians of the rounds' ratios; the times' interquartile ranges are "
            f"up to {_spread(run.records('mixed') for run in runs):.0%}):"
        )
        return self._page(text, rows, runs)

    def job(self) -> str:
        """The default fine-tuning job, as it wrote its metrics; where it ran is in the file beside them."""
        folder = self.folder / JOB
        job = read_json(folder / "metrics.json")
        beside = folder / "measured.json"
        where = {**(read_json(beside) if beside.exists() else {}), **job}
        shown = {
            "model": job["model"],
            "data": job["data"],
            "steps": str(job["steps"]),
            "trainable parameters": f"{job['trainable_parameters']:,}",
            "held-out loss before": f"{job['eval_loss_before']:.3f}",
            "after": f"{job['eval_loss_after']:.3f}",
            "tokens/s": f"{job['tokens_per_second']:.0f}",
            "peak memory": ", ".join(f"{value:,.0f} MiB ({kind})" for kind, value in job["peak_memory_mib"].items()),
        }
        place, date, commit = (where.get(key, "not recorded") for key in ("machine", "date", "commit"))
        versions = f"torch {job['versions']['torch']}, PEFT {job['versions']['peft']}"
        table = markdown([list(shown), list(shown.values())])
        return f"{table}\n\nMeasured with {versions}: {place}, commit {commit}, {date}."

    def four_bit(self) -> str:
        """The default fine-tuning job with the base in 4 bits, over seeds, beside PEFT's LoRA."""
        jobs = [read_json(file) for file in sorted((self.folder / FOUR_BIT).glob("*.json"))]
        rows = [["adapter", "seeds", "held-out loss before", "after, mean (least to greatest)", "standard deviation"]]
        for backend, label in (("fused", "ours"), ("lora", "PEFT's LoRA")):
            of_backend = [job for job in jobs if job["config"]["backend"] == backend]
            before, after = ([job[f"eval_loss_{when}"] for job in of_backend] for when in ("before", "after"))
            span = f"{statistics.mean(after):.3f} ({min(after):.3f} to {max(after):.3f})"
            spread = f"{statistics.stdev(after):.3f}" if len(after) > 1 else "one seed"
            rows.append([label, str(len(of_backend)), f"{statistics.mean(before):.3f}", span, spread])
        settings, versions = jobs[0]["config"], jobs[0]["versions"]
        sentence = (
            f"`gralora-ext finetune --load-in-4bit`, SmolLM2-135M in nf4, {jobs[0]['steps']} steps on the CPU, "
            f"r = {settings['r']}, learning rate {settings['lr']} for both, {jobs[0]['eval_rows']} held-out rows:"
        )
        measured = f"Measured with torch {versions['torch']}, PEFT {versions['peft']}, bitsandbytes {versions['bitsandbytes']}."
        return f"{sentence}\n\n{markdown(rows)}\n\n{measured}"

    def _with(self, *benches: str, what: str | None = None) -> list[Run]:
        """The runs that have records of these benches."""
        runs = [run for run in self.runs if run.records(*benches, what=what)]
        if not runs:
            raise JobError(f"{self.folder}: no run in it has the bench {' or '.join(benches)}")
        return runs

    def _beside(self, runs: list[Run], passes: dict[str, Callable[[Run], list[Record]]]) -> Rows:
        """A row for each run and pass: the ratios to each peer."""
        cases = [(run, name, of_run(run)) for run in runs for name, of_run in passes.items()]
        peers = [n for n in PEERS if any(_ratios(records, n) for _, _, records in cases)]
        rows = [["processor", "pass", "cases", *(f"beside {LABELS[n]}" for n in peers)]]
        for run, name, records in cases:
            rows.append([run.processor, name, str(len(records)), *(_times(records, n) for n in peers)])
        return rows

    def _page(self, sentence: str, rows: Rows, runs: list[Run]) -> str:
        """What the table says, the table, and what it was measured with."""
        of_settings: dict[str, list[str]] = {}
        for run in runs:
            of_settings.setdefault(run.settings, []).append(run.source)
        measured = [f"Measured with {settings}: {'; '.join(of)}." for settings, of in of_settings.items()]
        return "\n\n".join([sentence, markdown(rows), *measured])


MEANS = "geometric mean (least to greatest) of the medians of the rounds' ratios"
TABLES: dict[str, Callable[[Tables], str]] = {
    "step": Tables.step,
    "layers": Tables.layers,
    "path": Tables.path,
    "one-token": Tables.one_token,
    "kept": Tables.kept,
    "merge": Tables.merge,
    "mixed": Tables.mixed,
    "job": Tables.job,
    "four-bit": Tables.four_bit,
    "file-merge": Tables.file_merge,
    **{name: lambda tables, made=made: made(tables.folder) for name, made in compared.tables(RESULTS).items()},
}


def _path(bench: str, one_token: bool, run: Run) -> list[Record]:
    return [r for r in run.records(bench) if (r["case"]["T"] == 1) == one_token]


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
