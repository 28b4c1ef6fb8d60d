# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks report``: the tables of the documents, made from the committed results and never typed.

A document says ``<!-- figures: NAME -->`` on a line of its own, and ``<!-- end of figures -->`` on
another; what stands between them is written by :data:`benchmarks.figures.TABLES`.
"""

from __future__ import annotations

import re
from pathlib import Path

from gralora_ext.program.errors import JobError
from gralora_ext.program.files import staged

from .figures import RESULTS, ROOT, TABLES, Tables
from .results import read

BLOCK = re.compile(r"^<!-- figures: ([^\n]*?) -->\n(.*?)^<!-- end of figures -->$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"^<!-- (?:figures: .*?|end of figures) -->$", re.MULTILINE)


def report(documents: list[Path], folder: Path | None, *, check: bool) -> int:
    """Writes every table of the documents, or with ``check`` names those that differ; returns the exit code.

    Raises:
        JobError: a document or a result cannot be read, or a marker is unknown or has no end.
    """
    tables = Tables(folder or RESULTS)
    changed, count = [], 0
    for document in documents or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = read(document)
        new, names = rewritten(text, tables, document)
        count += len(names)
        before, after = (dict(BLOCK.findall(t)) for t in (text, new))
        changed += [f"{document}: table {name}" for name in dict.fromkeys(names) if before[name] != after[name]]
        if new != text and not check:
            with staged(document.parent) as stage:
                (stage / document.name).write_text(new, encoding="utf-8")
    for line in changed:
        print(f"{line} {'is not what the results say: run `python -m benchmarks report`' if check else 'written'}")
    print(f"{count} tables, {len(changed)} {'differ' if check else 'changed'}")
    return 1 if check and changed else 0


def rewritten(text: str, tables: Tables, document: Path) -> tuple[str, list[str]]:
    """``text`` with its tables made anew, and their names."""
    names = [match[1] for match in BLOCK.finditer(text)]
    if len(MARKER.findall(text)) != 2 * len(names) or any(MARKER.search(match[2]) for match in BLOCK.finditer(text)):
        raise JobError(f"{document}: every `<!-- figures: NAME -->` needs an `<!-- end of figures -->` of its own")
    if unknown := [name for name in names if name not in TABLES]:
        raise JobError(f"{document}: there are no figures {unknown[0]!r}, only {', '.join(TABLES)}")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise JobError(f"{document}: the figures {repeated[0]!r} stand there more than once")
    made = {name: TABLES[name](tables) for name in names}
    return BLOCK.sub(lambda m: f"<!-- figures: {m[1]} -->\n{made[m[1]]}\n<!-- end of figures -->", text), names
