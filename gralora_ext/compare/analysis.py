# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext analyze``: the runs of an analysis, what they say of the paper's claims, and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._gralora_k import CHOICES
from ..program import machine
from ..program.errors import JobError, Stopped
from ..program.files import staged, write_json
from . import contents, findings, pictures
from .comparison import Chooser, settings_of, stopped
from .findings import Finding
from .methods import METHODS, Method, of_k
from .plan import MEASURE
from .runner import RUNS, Record, Runner, running
from .summary import Choice
from .texts import gather

WIDE_RANK = 128  # the paper's
WIDE_UNITS = 10  # of work, for a wide layer that is trained alone


def analyze(options: Any) -> int:
    """Makes the runs that are missing, the findings and the figure; returns the exit code."""
    analysis = _KINDS[options.what](options)
    said = {name: value for name, value in vars(options).items() if name not in ("output", "debug")}
    try:
        with running(Path(options.output), said, analysis.texts, analysis.units(), f"analyze {options.what}") as runner:
            content = analysis.run(runner)
            with staged(runner.folder) as stage:
                write_json(stage / f"{options.what}.json", content)
                getattr(pictures, options.what)(content, stage / options.what)
                written = sorted(path.name for path in stage.iterdir())
    except Stopped as stop:
        return stopped(stop)
    print(f"\n{findings.page([Finding(**found) for found in content['findings']])}")
    runner.console.say(f"written: {', '.join(str(runner.folder / name) for name in written)}")
    return 0


class Analysis:
    """What the analyses share: one run for each case and seed, in the order of seeds."""

    extra: str | None = None

    def __init__(self, options: Any):
        self.options = options
        self.texts = gather(options)
        self.settings = settings_of(options, self.texts)
        self.chooser = Chooser(self.settings, options.lrs, options.extend, self.extra)
        self.records: dict[tuple[int, str], list[Record]] = {}  # by rank and method

    def cases(self) -> list[tuple[int, Method]]:
        raise NotImplementedError

    def units(self) -> int:
        measured = sum(self.chooser.run(m, MEASURE, 1.0, 0, rank).units for rank, m in self.cases())
        return sum(self.chooser.units(m, rank) for rank, m in self.cases()) + measured * self.options.seeds

    def measure(self, runner: Runner) -> dict[str, Any]:
        """Makes all runs; what the file says of them, but for what they show."""
        choices: dict[tuple[int, str], Choice] = {}
        for rank, method in self.cases():
            choices[rank, method.name] = self.chooser.choose(runner, method, rank)
        for seed in range(self.options.seeds):
            for rank, method in self.cases():
                run = self.chooser.run(method, MEASURE, choices[rank, method.name].rate, seed, rank)
                record = runner.record(run)
                if self.extra and record["extra"] is None:
                    raise JobError(
                        f"the run {record['name']} diverged, and has no adapter to measure: try a smaller --lrs"
                    )
                self.records.setdefault((rank, method.name), []).append(record)
        chosen = [{"rank": rank, **choice.as_dict()} for (rank, _), choice in choices.items()]
        names = [record["name"] for records in self.records.values() for record in records]
        one = next(iter(self.records.values()))[0]
        made = {key: one[key] for key in ("date", "git", "machine", "versions", "threads")}
        settings = {"seeds": self.options.seeds, "quick": self.options.quick, **self.settings.in_words()}
        return {"settings": settings, "choices": chosen, "runs": names, **made}


class Ranks(Analysis):
    extra = "ranks"

    def cases(self) -> list[tuple[int, Method]]:
        return [(self.options.rank, METHODS[f"gralora-k{k}"]) for k in CHOICES]

    def units(self) -> int:
        return super().units() + WIDE_UNITS * len(CHOICES) * self.options.seeds

    def run(self, runner: Runner) -> dict[str, Any]:
        content = self.measure(runner)
        wide = {k: [self._wide(runner, k, seed) for seed in range(self.options.seeds)] for k in CHOICES}
        from .wide_layer import WIDTH

        return {**content, **contents.of_ranks(self.records, wide, WIDE_RANK, WIDTH)}

    def _wide(self, runner: Runner, k: int, seed: int) -> dict[str, int]:
        """The ranks of a wide layer, from its file or measured in this process."""
        from . import wide_layer
        from .worker import ROOT, stamp

        name, digest = f"wide-k{k}-seed{seed}", wide_layer.digest(k, WIDE_RANK, seed)

        def make() -> None:
            facts = {"name": name, "digest": digest, "k": k, "r": WIDE_RANK, "seed": seed}
            found = wide_layer.trained(k, WIDE_RANK, seed, self.options.threads)
            record = {**facts, **found, **stamp("cpu", machine.commit(ROOT))}
            with staged(runner.folder / RUNS) as stage:
                write_json(stage / f"{name}.json", record)

        def words(record: Record) -> str:
            return f"one wide layer, k = {k}, seed {seed}: rank {record['ranks']['float64']}"

        return runner.kept(name, digest, WIDE_UNITS, make, words)["ranks"]


class Outliers(Analysis):
    extra = "outliers"

    def cases(self) -> list[tuple[int, Method]]:
        return [(self.options.rank, of_k(k)) for k in CHOICES]

    def run(self, runner: Runner) -> dict[str, Any]:
        return {**self.measure(runner), **contents.of_outliers(self.records)}


class Grid(Analysis):
    def cases(self) -> list[tuple[int, Method]]:
        methods = [of_k(k) for k in (1, *sorted(set(self.options.ks)))]
        return [(rank, method) for rank in sorted(set(self.options.ranks)) for method in methods]

    def run(self, runner: Runner) -> dict[str, Any]:
        content = self.measure(runner)
        at_edge = {(choice["rank"], choice["method"]): choice["at_edge"] for choice in content["choices"]}
        return {**content, **contents.of_grid(self.records, at_edge)}


_KINDS: dict[str, Any] = {"rank": Ranks, "outlier": Outliers, "grid": Grid}
