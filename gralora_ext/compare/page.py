# SPDX-License-Identifier: Apache-2.0
"""The page of a comparison: one HTML file with its data, style and program in it, so that it needs no network."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from typing import Any

from .pictures import COLOURS
from .summary import METRICS


def made(content: dict[str, Any]) -> str:
    """The page's text. Whatever stands in the data, it cannot end the element that holds it."""
    folder = files(__package__)
    shown = {**content, "colours": COLOURS}
    data = json.dumps(shown, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    text = (folder / "page.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(f"Methods compared on {content['settings']['model'].split(' (')[0]}"),
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "plots": (folder / "page_plots.js").read_text(encoding="utf-8"),
        "program": (folder / "page.js").read_text(encoding="utf-8"),
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text: its learning rate, its seeds, and each of METRICS."""
    rate = "" if row["rate"] is None else f"{row['rate']:g}{' (at the edge)' if row['at_edge'] else ''}"
    missing = "diverged" if row["diverged"] else ""
    return [rate, str(row["seeds"]), *(row["metrics"].get(m.key, {}).get("text", missing) for m in METRICS)]


def text_table(content: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = [["method", "lr", "seeds", *(m.label for m in METRICS)]]
    lines += [[row["method"], *cells(row)] for row in content["rows"]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
