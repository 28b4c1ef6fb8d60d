# SPDX-License-Identifier: Apache-2.0
"""Results as text: the tables of a run, and what became faster, slower, larger or smaller between two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .results import OURS

# The unit in the file → the unit on the page, and how many of the former make one of the latter.
UNITS = {"s": ("ms", 1e-3), "bytes": ("MiB", 2.0**20)}


def table(records: list[dict[str, Any]]) -> str:
    """One line a case: ours with spread, share of the roofline, pace and error, then each peer with ours/peer beside it.

    Cases with one token have a table of their own.
    """
    parts = [
        (unit, [r for r in records if r["unit"] == unit and (r["case"].get("T") == 1) == one_token])
        for unit in UNITS
        for one_token in (False, True)
    ]
    return "\n\n".join(_table(unit, part) for unit, part in parts if part)


def _table(unit: str, records: list[dict[str, Any]]) -> str:
    label, scale = UNITS[unit]
    peers = list(dict.fromkeys(name for record in records for name in record["contenders"] if name != OURS))
    timed = unit == "s"
    head = ["case", f"ours {label}", *(["IQR", "roof", "pace", "error"] if timed else [])]
    for peer in peers:
        head += [f"{peer} {label}", "ours/"]
    rows = [head]
    for record in records:
        row = [record["key"], *_ours(record, scale, timed)]
        for peer in peers:
            found = record["contenders"].get(peer)
            row += [number(found["median"] / scale) if found else "", _ratio(record["ratios"].get(peer))]
        rows.append(row)
    return align(rows)


def _ours(record: dict[str, Any], scale: float, timed: bool) -> list[str]:
    entry = record["contenders"][OURS]
    median = number(entry["median"] / scale)
    if not timed:
        return [median]
    error = entry["error"]
    return [
        median,
        spread(entry),
        _share(entry["roofline"]),
        _share(record.get("pace")),
        "" if error is None else f"{error:.0e}",
    ]


def spread(entry: dict[str, Any]) -> str:
    """The interquartile range as a share of the median; an overhead can be negative."""
    return f"{(entry['q3'] - entry['q1']) / abs(entry['median']):.0%}" if entry["median"] else ""


def number(value: float) -> str:
    """Three significant digits, never with an exponent."""
    if value and abs(value) < 1:
        return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def align(rows: Iterable[list[str]]) -> str:
    """The first column to the left, all others to the right, two spaces between."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# Two runs

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


def comparison_text(comparison: Comparison) -> str:
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
