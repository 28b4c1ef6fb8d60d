"""``python -m benchmarks compare A B``: what became faster, slower, larger or smaller from run A to run B."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .results import OURS
from .table import UNITS, align, number

LEAST_CHANGE = 0.05

Key = tuple[str, str, str]  # bench, case, contender


@dataclass(frozen=True)
class Change:
    """The medians of one contender in one case, in the unit of the file."""

    key: Key
    unit: str
    before: float
    after: float

    @property
    def relative(self) -> float:
        """(after − before) / |before|."""
        return (self.after - self.before) / abs(self.before)


@dataclass
class Comparison:
    """``compared`` counts the cases in both runs; the others are in ``only_before`` or ``only_after``."""

    improved: list[Change] = field(default_factory=list)
    regressed: list[Change] = field(default_factory=list)
    only_before: list[Key] = field(default_factory=list)
    only_after: list[Key] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    compared: int = 0

    @property
    def we_regressed(self) -> bool:
        """A kernel of ours is among the regressed. A peer that is tells of the machine."""
        return any(change.key[2].startswith(OURS) for change in self.regressed)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """A change counts where the two interquartile ranges do not meet and the medians differ by more than 5 %."""
    old, new = _entries(before), _entries(after)
    result = Comparison(warnings=_warnings(before, after))
    result.only_before = [key for key in old if key not in new]
    result.only_after = [key for key in new if key not in old]
    for key in (key for key in old if key in new):
        (unit, a), (_, b) = old[key], new[key]
        result.compared += 1
        change = Change(key, unit, a["median"], b["median"])
        if not a["median"] or abs(change.relative) <= LEAST_CHANGE:
            continue
        if b["q1"] > a["q3"]:
            result.regressed.append(change)
        elif b["q3"] < a["q1"]:
            result.improved.append(change)
    result.regressed.sort(key=lambda change: -change.relative)
    result.improved.sort(key=lambda change: change.relative)
    return result


def report(comparison: Comparison) -> str:
    """The comparison as text."""
    lines = [f"warning: {warning}" for warning in comparison.warnings]
    for title, changes in (("regressed", comparison.regressed), ("improved", comparison.improved)):
        lines += ["", f"{title}: {len(changes)}"]
        if changes:
            lines.append(align([_row(change) for change in changes]))
    for title, keys in (("only in A", comparison.only_before), ("only in B", comparison.only_after)):
        contenders: dict[str, list[str]] = {}
        for bench, case, contender in keys:
            contenders.setdefault(f"{bench}: {case}", []).append(contender)
        if keys:
            lines += ["", f"{title}: {len(contenders)} cases"]
            lines += [f"  {case} ({', '.join(names)})" for case, names in contenders.items()]
    unchanged = comparison.compared - len(comparison.regressed) - len(comparison.improved)
    lines += ["", f"unchanged within the spread or {LEAST_CHANGE:.0%}: {unchanged}"]
    return "\n".join(lines).strip("\n")


def _entries(run: dict[str, Any]) -> dict[Key, tuple[str, dict[str, Any]]]:
    return {
        (record["bench"], record["key"], name): (record["unit"], entry)
        for record in run["records"]
        for name, entry in record["contenders"].items()
    }


def _warnings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Whatever makes the two runs differ beside the code."""
    found = []
    for part in ("machine", "settings", "versions"):
        for name in before[part].keys() | after[part].keys():
            a, b = before[part].get(name), after[part].get(name)
            if a != b:
                found.append(f"the runs differ in {part}.{name}: {a} and {b}")
    for name, run in (("A", before), ("B", after)):
        if not run["complete"]:
            found.append(f"run {name} was stopped before its end")
    return sorted(found)


def _row(change: Change) -> list[str]:
    bench, case, contender = change.key
    label, scale = UNITS[change.unit]
    values = f"{number(change.before / scale)} → {number(change.after / scale)} {label}"
    return [f"  {bench}: {case}, {contender}", values, f"{change.relative:+.1%}"]
