# SPDX-License-Identifier: Apache-2.0
"""Writes the table of options in docs/finetune.md from gralora_ext/cli/option_table.py.

usage: python scripts/option_table.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.argv[0] = "gralora-ext"  # the package then imports no torch

from gralora_ext.cli.option_table import BACKENDS, TABLE

PAGE = ROOT / "docs" / "finetune.md"
START, END = "<!-- options -->\n", "<!-- end of options -->\n"


def table() -> str:
    lines = []
    for title, options in TABLE.items():
        lines += [
            f"\n**{title.capitalize()}**\n",
            "| option | default | what it is | other names |",
            "| --- | --- | --- | --- |",
        ]
        for option in options:
            stated = re.search(r"\(default: (.*)\)", option.help)
            default = stated[1] if stated else "" if option.default is None else f"`{option.default}`"
            what = re.sub(r" ?\(default: .*\)", "", option.help)
            choices = re.findall(r"\w+", option.kind.metavar) if (option.kind.metavar or "").startswith("{") else []
            if not set(choices) <= set(re.findall(r"\w+", what)):
                what += f" ({', '.join(choices)})"
            if option.only != BACKENDS:
                what += f"; `--backend {'` or `'.join(option.only)}`"
            others = ", ".join(f"`{name}`" for name in option.also.split())
            lines.append(f"| `--{option.name}` | {default} | {what} | {others} |".replace("  ", " "))
    return "\n".join(lines) + "\n\n"


def page() -> str:
    """The page as it is to be."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
