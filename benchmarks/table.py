"""Results as aligned text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .results import OURS

# The unit in the file → the unit on the page, and how many of the former make one of the latter.
UNITS = {"s": ("ms", 1e-3), "bytes": ("MiB", 2.0**20)}


def table(records: list[dict[str, Any]]) -> str:
    """One line a case: ours with spread, share of the roofline, pace and error, then each peer with ours/peer beside it."""
    by_unit = {unit: [record for record in records if record["unit"] == unit] for unit in UNITS}
    return "\n\n".join(_table(unit, of_unit) for unit, of_unit in by_unit.items() if of_unit)


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
