# SPDX-License-Identifier: Apache-2.0
"""All rows of a job, from ``--data`` and ``--eval-data``: those to learn from, and those held out. Needs no torch."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..program.errors import JobError
from .chat import read_template
from .option_table import OPTIONS
from .rows import Fields, Row, read_rows, text_for_digest


@dataclass
class Gathered:
    """``said`` is told to the user; ``digest`` is of all that the rows' tokens depend on beside the tokenizer."""

    name: str
    train: list[Row]
    held_out: list[Row]
    said: list[str]
    digest: str
    template: str | None


def gather(options: argparse.Namespace) -> Gathered:
    """Reads and checks all rows; of those held out ``--eval-rows`` are kept. Raises JobError."""
    o = options
    template = None if o.chat_template is None else read_template(o.chat_template)
    fields = Fields(o.prompt_field, o.answer_field, o.messages_field, o.text_field)
    by_itself = o.eval_data is not None
    _check_parts(o)
    rows = read_rows(o.data, fields, o.data_config, o.data_split, least=1 if by_itself else 2)
    said, digest = [rows.remark], rows.digest
    if by_itself:
        split = o.eval_split or o.data_split
        others = read_rows(o.eval_data, fields, o.data_config, split, option="--eval-data", least=1)
        if others.digest == rows.digest:
            raise JobError(
                f"--eval-data: {others.name} has the same rows as the training data: name other rows, or another split "
                "by --eval-split, or leave out --eval-data"
            )
        train, held_out, which = rows.rows, others.rows, f"{len(others.rows):,} of {others.name} held out"
        said, digest = [*said, others.remark], _of(digest, others.digest)
    else:
        train, held_out = rows.split(o.held_out or 0, o.seed if o.held_out_from == "random" else None)
        which = f"the last {len(held_out):,} held out"
        if o.held_out_from == "random":
            which = f"{len(held_out):,} held out, drawn by --seed {o.seed}"
    kept = _evaluated(held_out, o.eval_rows, o.eval_rows_from)
    line = f"data: {rows.name}: {len(train):,} {rows.what} to train on, {which} (each evaluation reads {len(kept)})"
    if template is not None:
        digest = _of(digest, template)
    if learned := _among(kept, train):
        said.append(
            f"{learned} of the {len(kept)} held-out rows are among those to train on: new rows may have a greater loss"
        )
    return Gathered(rows.name, train, kept, [line, *filter(None, said)], digest, template)


def _check_parts(options: argparse.Namespace) -> None:
    """A file is read whole: an option that asks for a part of it would do nothing."""
    o = options
    data, others = o.data or [], o.eval_data or []
    # What --data-config and --data-split say holds for --eval-data too, but for a split of its own.
    read_by = {
        "data_config": [*data, *others],
        "data_split": [*data, *([] if o.eval_split else others)],
        "eval_split": others,
    }
    for key, places in read_by.items():
        is_given = getattr(o, key) not in (None, OPTIONS[key].default)
        if is_given and all(Path(place).expanduser().is_file() for place in places):
            raise JobError(
                f"--{OPTIONS[key].name}: the rows are those of files, which are read whole: leave the option out"
            )


def _evaluated(held_out: list[Row], count: int, where: str) -> list[Row]:
    """The first ``count`` rows, or as many that are evenly spaced over all: a file may be sorted."""
    if where == "start" or len(held_out) <= count:
        return held_out[:count]
    return [held_out[i * len(held_out) // count] for i in range(count)]


def _among(held_out: list[Row], train: list[Row]) -> int:
    """How many held-out rows are equal to one that is trained on."""
    learned = set(map(_text, held_out)).intersection(map(_text, train))
    return sum(_text(row) in learned for row in held_out)


def _text(row: Row) -> str:
    return json.dumps(row, default=text_for_digest)


def _of(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
