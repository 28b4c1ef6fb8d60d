# SPDX-License-Identifier: Apache-2.0
"""Means and spreads over seeds, from the files of runs. Needs no torch."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .methods import METHODS, Method

Record = dict[str, Any]
LEAST_SEEDS = 3  # what a claim rests on
MOST_WAITED = 0.1  # of a run's time, see machine.waited
LEVEL = 0.05  # of pairs that do not differ, so many are told apart nonetheless


@dataclass(frozen=True)
class Metric:
    """A column: ``value`` takes it from a run's file and from that of the untrained model; ``digits`` after the point."""

    key: str
    label: str
    unit: str
    digits: int
    less_is_better: bool
    value: Callable[[Record, Record], float | None]


def _result(key: str, divisor: float = 1.0) -> Callable[[Record, Record], float | None]:
    def value(record: Record, base: Record) -> float | None:
        found = record["results"][key]
        return None if found is None else found / divisor

    return value


def _forgetting(record: Record, base: Record) -> float | None:
    after, before = record["results"]["general_loss"], base["results"]["general_loss"]
    return None if after is None or before is None else after - before


def _peak(record: Record, base: Record) -> float | None:
    peak = record["results"]["peak_memory_mib"]
    return peak.get("cuda", peak["host"])


METRICS = (
    Metric("loss", "held-out loss", "nats per answer token", 4, True, _result("loss")),
    Metric("general_loss", "loss on general text", "nats per token", 4, True, _result("general_loss")),
    Metric("forgetting", "forgetting", "general loss after training minus before", 4, True, _forgetting),
    Metric("tokens_per_second", "speed", "tokens/s in training", 0, False, _result("tokens_per_second")),
    Metric("peak_memory", "peak memory", "MiB", 0, True, _peak),
    Metric("parameters", "trained parameters", "millions", 3, True, _result("parameters", 1e6)),
    Metric("checkpoint", "checkpoint", "MiB", 1, True, _result("checkpoint_bytes", 2**20)),
)
_OF_BASE = ("loss", "general_loss")  # the others tell nothing of a model that is not trained


@dataclass(frozen=True)
class Spread:
    """Of a value over seeds: the mean and the sample's standard deviation, None for a single one."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:,.{digits}f}"
        return f"{self.mean:,.{digits}f}{spread}"

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "deviation": self.deviation, "values": list(self.values)}


def spread(values: Sequence[float | None]) -> Spread | None:
    """None where a run had no finite value: a mean of the others would hide it."""
    found = [v for v in values if v is not None and math.isfinite(v)]
    return Spread(tuple(found)) if found and len(found) == len(values) else None


def apart(one: Spread, other: Spread, pairs: int = 1) -> bool:
    """Whether a paired t-test tells the means of the same seeds apart; never with fewer seeds than a claim takes.

    A seed gives all methods the same order of rows, and what that does to the values is not in
    their differences. ``pairs``: how many pairs are tried where one is enough for a claim; each is
    tried at 5 % divided by that (Bonferroni).
    """
    differences = [a - b for a, b in zip(one.values, other.values, strict=True)]
    n = len(differences)
    if n < LEAST_SEEDS:
        return False
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return mean != 0
    return beyond_t(abs(mean) / error, n - 1) < LEVEL / pairs


def beyond_t(t: float, freedom: float) -> float:
    """The probability that Student's t, of ``freedom`` degrees, is farther from 0 than ``t``.

    With T = √ν tan θ the density of θ is Γ((ν+1)/2) / (√π Γ(ν/2)) · cos(θ)^(ν-1), which is summed
    by Simpson's rule.
    """
    log_factor = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    end, parts = math.atan2(t, math.sqrt(freedom)), 200
    weights = [1, *(4 if i % 2 else 2 for i in range(1, parts)), 1]
    heights = (math.cos(end * i / parts) ** (freedom - 1) for i in range(parts + 1))
    area = sum(map(operator.mul, weights, heights)) * end / parts / 3
    return 1 - 2 * math.exp(log_factor) * area


@dataclass(frozen=True)
class Choice:
    """The learning rate of a method: what was tried on the validation rows, and which had the least loss there."""

    method: Method
    losses: dict[float, float | None]  # None: diverged
    rate: float

    @property
    def at_edge(self) -> bool:
        """Whether the best one is the least or the greatest that was tried, so that one beyond it may be better."""
        return len(self.losses) > 1 and self.rate in (min(self.losses), max(self.losses))

    def as_dict(self) -> dict[str, Any]:
        tried = [{"rate": rate, "loss": loss} for rate, loss in sorted(self.losses.items())]
        return {"method": self.method.name, "rate": self.rate, "at_edge": self.at_edge, "tried": tried}


def was_busy(record: Record) -> bool:
    """Whether the run's threads often had no core, as when other programs use them: its speed is too low then."""
    waited = record.get("waited")
    return record["load"] > record["machine"]["cores"] + 1 if waited is None else waited > MOST_WAITED


def best_rate(losses: dict[float, float | None]) -> float | None:
    """The rate with the least loss; None where all diverged."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(finite, key=lambda rate: (finite[rate], rate)) if finite else None


def rows(records: dict[str, list[Record]], base: Record, choices: dict[str, Choice]) -> list[dict[str, Any]]:
    """A row of the table for each method that has runs, the untrained model first."""
    table = [_row("base", "no training", None, [base], base, _OF_BASE)]
    for name, of_method in records.items():
        if of_method:
            choice = choices.get(name)
            table.append(_row(name, METHODS[name].label, choice, of_method, base, tuple(m.key for m in METRICS)))
    mark(table)
    return table


def mark(table: list[dict[str, Any]]) -> None:
    """Marks of each metric the best mean, and those that are not told apart from it; not where runs never differ.

    The test's 5 % are for all pairs with the best.
    """
    for metric in METRICS:
        found = [
            row["metrics"][metric.key] for row in table if row["method"] != "base" and metric.key in row["metrics"]
        ]
        if not any(one["deviation"] for one in found):
            continue
        best = (min if metric.less_is_better else max)(found, key=operator.itemgetter("mean"))
        for one in found:
            near = not apart(Spread(tuple(one["values"])), Spread(tuple(best["values"])), len(found) - 1)
            one["mark"] = "best" if one is best else "near" if near else None


def _row(
    name: str, label: str, choice: Choice | None, records: list[Record], base: Record, keys: Sequence[str]
) -> dict[str, Any]:
    found = {m.key: spread([m.value(r, base) for r in records]) for m in METRICS if m.key in keys}
    texts = {m.key: s.text(m.digits) for m in METRICS if (s := found.get(m.key))}
    return {
        "method": name,
        "label": label,
        "rate": records[0]["run"]["rate"],
        "at_edge": choice.at_edge if choice else False,
        "seeds": len(records),
        "diverged": sum(r["results"]["diverged"] is not None for r in records),
        "metrics": {key: {**s.as_dict(), "text": texts[key]} for key, s in found.items() if s},
    }
