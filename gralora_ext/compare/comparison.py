# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext compare``: the untrained model, a learning rate for each method, and runs of each seed with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..cli.source import find_model
from ..program.errors import Stopped
from ..program.files import staged, write_json
from . import findings, page, pictures, summary
from .methods import BASE, Method, beyond, chosen
from .plan import CHOOSE, CHOOSING_SEED, MEASURE, Run, Settings, digest_of
from .runner import Record, Runner, running
from .summary import Choice
from .texts import Texts, gather

PAGE, SUMMARY, PICTURE = "compare.html", "summary.json", "compare"


def compare(options: Any) -> int:
    """Makes the runs that are missing, and the page of all; returns the exit code."""
    comparison = Comparison(options)
    what = {name: value for name, value in vars(options).items() if name not in ("output", "debug")}
    try:
        with running(Path(options.output), what, comparison.texts, comparison.units(), "compare") as runner:
            comparison.run(runner)
    except Stopped as stop:
        return stopped(stop)
    content = comparison.content()
    print("\n".join(["", page.text_table(content), "", *content["sentences"], ""]))
    runner.console.say(f"written: {', '.join(str(runner.folder / name) for name in comparison.written)}")
    return 0


def stopped(stop: Stopped) -> int:
    print(
        f"stopped by {stop.name}; finished runs are kept, and the same command goes on with the others", file=sys.stderr
    )
    return stop.exit_code


def settings_of(options: Any, texts: Texts) -> Settings:
    source = find_model(options.model)
    return Settings(
        model=options.model and source.place,
        model_name=source.name if options.model is None else Path(source.name).name,
        model_files=None if options.model is None else _files(Path(source.place)),
        rank=options.rank,
        steps=options.steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
        dtype=options.dtype,
        threads=options.threads,
        texts=texts.facts(),
        digests={part: texts.digest(part) for part in (CHOOSE, MEASURE)},
    )


def _files(place: Path) -> str | None:
    """A digest of names, sizes and times, by which a model that was written anew is known; None for a hub's name."""
    if not place.exists():
        return None
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(place)), (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
    return digest_of(facts)


class Chooser:
    """Makes runs of methods, and finds each one's learning rate on the validation rows."""

    def __init__(self, settings: Settings, rates: list[float] | None, extend: int, extra: str | None = None):
        self.settings = settings
        self.given = rates
        self.extend = extend
        self.extra = extra

    def run(self, method: Method, part: str, rate: float | None, seed: int, rank: int | None = None) -> Run:
        rank = rank or self.settings.rank
        extra = self.extra if part == MEASURE else None
        return Run(method.name, method.kind, part, rate, seed, rank, method.at_rank(rank), self.settings, extra)

    def rates(self, method: Method) -> tuple[float, ...]:
        return tuple(self.given) if self.given and method.kind == "adapter" else method.rates

    def units(self, method: Method, rank: int | None = None) -> int:
        rates = self.rates(method)
        return sum(self.run(method, CHOOSE, rate, CHOOSING_SEED, rank).units for rate in rates) if len(rates) > 1 else 0

    def choose(self, runner: Runner, method: Method, rank: int | None = None) -> Choice:
        """The rate with the least loss on the validation rows; beyond one at the edge another one is tried."""
        rates = self.rates(method)
        losses: dict[float, float | None] = {}
        if len(rates) == 1:
            return Choice(method, losses, rates[0])

        def attempt(rate: float, planned: bool) -> None:
            run = self.run(method, CHOOSE, rate, CHOOSING_SEED, rank)
            losses[rate] = runner.record(run, planned)["results"]["loss"]

        for rate in rates:
            attempt(rate, True)
        for _ in range(self.extend):
            best = summary.best_rate(losses)
            if best not in (None, min(losses), max(losses)):
                break
            attempt(beyond(best or min(losses), best == max(losses)), False)
        return Choice(method, losses, summary.best_rate(losses) or min(losses))


class Comparison:
    def __init__(self, options: Any):
        self.options = options
        self.methods = chosen(options.methods)
        self.texts = gather(options)
        self.settings = settings_of(options, self.texts)
        self.chooser = Chooser(self.settings, options.lrs, options.extend)
        self.base: Record | None = None
        self.choices: dict[str, Choice] = {}
        self.records: dict[str, list[Record]] = {method.name: [] for method in self.methods}
        self.written: list[str] = []

    def units(self) -> int:
        measured = sum(self.chooser.run(m, MEASURE, 1.0, 0).units for m in self.methods) * self.options.seeds
        base = self.chooser.run(BASE, MEASURE, None, 0).units
        return base + sum(map(self.chooser.units, self.methods)) + measured

    def run(self, runner: Runner) -> None:
        """All runs; the page is written anew whenever each method has one more seed."""
        self.base = runner.record(self.chooser.run(BASE, MEASURE, None, 0))
        for method in self.methods:
            self.choices[method.name] = self.chooser.choose(runner, method)
        for seed in range(self.options.seeds):
            for method in self.methods:
                rate = self.choices[method.name].rate
                self.records[method.name].append(runner.record(self.chooser.run(method, MEASURE, rate, seed)))
            self.write(runner.folder)

    def write(self, folder: Path) -> None:
        """The page, the table as JSON, and the picture."""
        content = self.content()
        with staged(folder) as stage:
            write_json(stage / SUMMARY, {k: v for k, v in content.items() if k != "runs"})
            (stage / PAGE).write_text(page.made(content), encoding="utf-8")
            pictures.comparison(content, stage / PICTURE)
            self.written = sorted(p.name for p in stage.iterdir())

    def _left_out(self) -> str:
        """How many test rows the losses do not have, since finetune measures no row whose answer is cut off."""
        assert self.base is not None
        asked, measured = self.settings.held_out_rows(MEASURE), self.base["results"]["held_out_rows"]
        if measured == asked:
            return ""
        return f"Test rows: {measured} of {asked} are measured; the answers of the others lie beyond --max-length."

    def content(self) -> dict[str, Any]:
        """All that the page shows."""
        assert self.base is not None
        table = summary.rows(self.records, self.base, self.choices)
        said = [
            findings.beside(table, key, what) for key, what in (("loss", "Held-out loss"), ("forgetting", "Forgetting"))
        ]
        runs = [self.base, *(record for of_method in self.records.values() for record in of_method)]
        return {
            "settings": {
                "seeds": self.options.seeds,
                "quick": self.options.quick,
                "rank": self.settings.rank,
                **self.settings.in_words(),
            },
            "metrics": [
                {k: getattr(m, k) for k in ("key", "label", "unit", "digits", "less_is_better")}
                for m in summary.METRICS
            ],
            "rows": table,
            "sentences": [sentence for sentence in (*said, self._left_out()) if sentence],
            "made": {key: self.base[key] for key in ("date", "git", "machine", "versions", "threads")},
            "busy": any(map(summary.was_busy, runs)),
            "choices": [choice.as_dict() for choice in self.choices.values()],
            "runs": runs,
        }
