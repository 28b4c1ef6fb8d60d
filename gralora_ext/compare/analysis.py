# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext analyze``: the runs of an analysis, what they say of the paper's claims, and the figure."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..program import machine
from ..program.errors import JobError, Stopped
from ..program.files import staged, write_json
from . import findings, pictures
from .comparison import Chooser, settings_of, stopped
from .findings import KS, Finding
from .grid_findings import Case, best_k, predicted_ks, worse_at_high_rank
from .methods import METHODS, Method
from .plan import MEASURE
from .runner import RUNS, Record, Runner, running
from .summary import Choice, Spread, spread
from .texts import gather

WIDE_RANK = 128  # the paper's
WIDE_UNITS = 10  # of work, for a wide layer that is trained alone
CHANGED = 0.01  # a block whose gradient an outlier changes by more than this share is one that it reaches


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

    @property
    def parameters(self) -> int:
        """Of the model."""
        return next(iter(self.records.values()))[0]["results"]["model_parameters"]


class Ranks(Analysis):
    extra = "ranks"

    def cases(self) -> list[tuple[int, Method]]:
        return [(self.options.rank, METHODS[f"gralora-k{k}"]) for k in KS]

    def units(self) -> int:
        return super().units() + WIDE_UNITS * len(KS) * self.options.seeds

    def run(self, runner: Runner) -> dict[str, Any]:
        content = self.measure(runner)
        r = self.options.rank
        in_model = {k: [x for record in self.records[r, f"gralora-k{k}"] for x in record["extra"]] for k in KS}
        wide = {k: [self._wide(runner, k, seed) for seed in range(self.options.seeds)] for k in KS}
        from .wide_layer import WIDTH

        found = [
            findings.rank_in_model(in_model, r, self.options.seeds, self.parameters),
            findings.rank_of_paper(wide, WIDE_RANK, WIDTH, WIDTH**2),
        ]
        tables = {"in_model": {str(k): v for k, v in in_model.items()}, "wide": {str(k): v for k, v in wide.items()}}
        return {**content, "rank": r, "wide_rank": WIDE_RANK, "width": WIDTH, **tables, "findings": _dicts(found)}

    def _wide(self, runner: Runner, k: int, seed: int) -> dict[str, int]:
        """The ranks of a wide layer, from its file or measured in this process."""
        from . import wide_layer
        from .worker import ROOT, stamp

        name, digest = f"wide-k{k}-seed{seed}", wide_layer.digest(k, WIDE_RANK, seed)

        def make() -> None:
            facts = {"name": name, "digest": digest, "k": k, "r": WIDE_RANK, "seed": seed}
            record = {**facts, **wide_layer.trained(k, WIDE_RANK, seed), **stamp("cpu", machine.commit(ROOT))}
            with staged(runner.folder / RUNS) as stage:
                write_json(stage / f"{name}.json", record)

        def words(record: Record) -> str:
            return f"one wide layer, k = {k}, seed {seed}: rank {record['ranks']['float64']}"

        return runner.kept(name, digest, WIDE_UNITS, make, words)["ranks"]


class Outliers(Analysis):
    extra = "outliers"

    def cases(self) -> list[tuple[int, Method]]:
        return [(self.options.rank, METHODS[name]) for name in ("lora", *(f"gralora-k{k}" for k in KS if k > 1))]

    def run(self, runner: Runner) -> dict[str, Any]:
        content = self.measure(runner)
        by_k = {_k(name): records for (_, name), records in self.records.items()}

        def over_seeds(k: int, value: Callable[[dict[str, Any]], float]) -> Spread:
            means = [sum(map(value, record["extra"])) / len(record["extra"]) for record in by_k[k]]
            return spread(means) or Spread((float("nan"),))

        shares = {k: over_seeds(k, lambda layer: _share(layer["change"])) for k in by_k}
        cosines = {
            what: {k: over_seeds(k, operator.itemgetter(f"cosine_{what}")) for k in by_k}
            for what in ("with", "without")
        }
        found = [
            findings.blocks_reached(shares, self.options.seeds, self.parameters),
            findings.nearer_to_full(cosines["with"], cosines["without"], self.parameters),
        ]
        layers = [
            {"k": k, "seed": record["run"]["seed"], **layer}
            for k, records in by_k.items()
            for record in records
            for layer in record["extra"]
        ]
        summed = {f"cosines_{what}": _spreads(of) for what, of in cosines.items()}
        steps = {what: _spreads({k: over_seeds(k, operator.itemgetter(what)) for k in by_k})
                 for what in ("cosine_of_a", "cosine_of_b", "size_of_a")}  # fmt: skip
        return {
            **content,
            "rank": self.options.rank,
            "shares": _spreads(shares),
            **summed,
            "steps": steps,
            "layers": layers,
            "findings": _dicts(found),
        }


class Grid(Analysis):
    def cases(self) -> list[tuple[int, Method]]:
        methods = [METHODS["lora"], *(METHODS[f"gralora-k{k}"] for k in sorted(set(self.options.ks)))]
        return [(rank, method) for rank in sorted(set(self.options.ranks)) for method in methods]

    def run(self, runner: Runner) -> dict[str, Any]:
        content = self.measure(runner)
        cases: dict[tuple[int, int], Case] = {}
        edges = {(choice["rank"], choice["method"]): choice["at_edge"] for choice in content["choices"]}
        for (rank, name), records in self.records.items():
            losses = spread([record["results"]["loss"] for record in records])
            cases[rank, _k(name)] = Case(losses, edges[rank, name])
        ranks = sorted({rank for rank, _ in cases})
        lora = {rank: cases[rank, 1] for rank in ranks}
        # Of GraLoRA the k of the paper's ratio: the best one would be chosen on the test rows.
        ks = sorted({k for _, k in cases if k > 1})
        gralora = {rank: cases[rank, predicted_ks(rank, ks)[0]] for rank in ranks}
        for name, by_rank in (("LoRA", lora), ("GraLoRA", gralora)):
            if not any(case.losses for case in by_rank.values()):
                raise JobError(f"analyze grid: each case of {name} has a run that diverged: try a smaller --lrs")
        found = [
            worse_at_high_rank("LoRA", lora, True, self.parameters),
            worse_at_high_rank("GraLoRA with r/k² nearest to 8", gralora, False, self.parameters),
            best_k(cases, self.parameters),
        ]
        cells = [
            {
                "r": r,
                "k": k,
                **(case.losses.as_dict() if case.losses else {"mean": None, "deviation": None, "values": []}),
                "predicted": k in predicted_ks(r, [1, *ks]),
            }
            for (r, k), case in cases.items()
        ]
        return {**content, "cells": cells, "findings": _dicts(found)}


def _k(method: str) -> int:
    """LoRA is k = 1."""
    return METHODS[method].options.get("k", 1)


def _share(change: list[list[float]]) -> float:
    values = [value for row in change for value in row]
    return sum(value > CHANGED for value in values) / len(values)


def _spreads(by_k: dict[int, Spread]) -> dict[str, Any]:
    return {str(k): s.as_dict() for k, s in by_k.items()}


def _dicts(found: list[Finding]) -> list[dict[str, str]]:
    return [one.as_dict() for one in found]


_KINDS: dict[str, Any] = {"rank": Ranks, "outlier": Outliers, "grid": Grid}
