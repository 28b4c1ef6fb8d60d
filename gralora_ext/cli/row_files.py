# SPDX-License-Identifier: Apache-2.0
"""Rows as they lie in files and in sets of `datasets`, each with its place for a message. Needs no torch."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..program.errors import JobError, first_sentence

Placed = tuple[str, Any]  # where a row is, as in `data.jsonl:3`, and the row
_SPACE = re.compile(r"\s*")
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read(place: str, config: str | None, split: str, option: str) -> Iterator[Placed]:
    """The rows of a file, or of a folder or name that ``datasets.load_dataset`` knows; ``option`` is what named it."""
    path = Path(place).expanduser()
    if path.is_file():
        yield from _of_file(path)
        return
    looks_like_a_file = path.suffix.lower() in ENDINGS or place.startswith(("/", "./", "../", "~"))
    if looks_like_a_file and not path.is_dir():
        raise JobError(f"{option}: there is no file {place}")
    yield from _of_datasets(place, config, split, option)


def _of_file(path: Path) -> Iterator[Placed]:
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            yield from _parquet(path)
        elif ending in (".csv", ".tsv"):
            yield from _csv(path, "," if ending == ".csv" else "\t")
        elif ending == ".json" and _begins_with_bracket(path):
            yield from _json_array(path)
        else:
            yield from _json_lines(path)
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror or first_sentence(error)}") from error


def _json_lines(path: Path) -> Iterator[Placed]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            line = _decoded(raw, where).strip()
            if line:
                yield where, _json(line, where)


def _json_array(path: Path) -> Iterator[Placed]:
    """One element after the other, so that each has its line."""
    text = _decoded(path.read_bytes(), str(path))
    line, counted, at = 1, 0, text.index("[") + 1
    may_end = True  # else an element must follow
    while True:
        at = _after_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        if text[at : at + 1] == "]" and may_end:
            if text[at + 1 :].strip():
                raise JobError(f"{where}: not JSON: something follows the end of the list")
            return
        row, at = _json(text, where, at)
        yield where, row
        at = _after_space(text, at)
        if text[at : at + 1] not in (",", "]"):
            raise JobError(f"{path}:{line + text.count(chr(10), counted, at)}: not JSON: expected a comma or a bracket")
        may_end = text[at] == "]"
        at += not may_end


def _after_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _json(text: str, where: str, at: int | None = None) -> Any:
    """The JSON value ``text``, or with ``at`` the one that begins there, and its end."""
    try:
        return json.loads(text) if at is None else json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        if at is not None:
            where = f"{where.rpartition(':')[0]}:{error.lineno}"
        raise JobError(f"{where}: not a JSON object: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # a number of thousands of digits
        raise JobError(f"{where}: not a JSON object: {first_sentence(error).split(';')[0]}") from None
    except RecursionError:
        raise JobError(f"{where}: not a JSON object: nested too deeply") from None


def _csv(path: Path, delimiter: str) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)
    text = _decoded(path.read_bytes(), str(path))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    try:
        for values in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not names:
                names = values
                if len(set(names)) < len(names):
                    raise JobError(f"{where}: two columns have the same name; the columns are {', '.join(names)}")
            elif values and len(values) != len(names):
                raise JobError(f"{where}: expected {len(names)} columns, as the first line has, got {len(values)}")
            elif values:
                yield where, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise JobError(f"{path}:{line}: not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Placed]:
    if importlib.util.find_spec("pyarrow") is None:
        raise JobError(f"{path} is a Parquet file, and reading those needs `pip install pyarrow`")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise JobError(f"{path} cannot be read as a Parquet file: {first_sentence(error)}") from error


def _of_datasets(name: str, config: str | None, split: str, option: str) -> Iterator[Placed]:
    if importlib.util.find_spec("datasets") is None:
        raise JobError(f"{option} {name} is not a file, and a dataset's name needs `pip install datasets`")
    import datasets

    path = Path(name).expanduser()
    try:
        if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):  # of save_to_disk
            saved = datasets.load_from_disk(str(path))
            if not isinstance(saved, dict) and split != "train":
                raise JobError(f"{option}: {name} was saved without splits, and the split {split} is asked for")
            rows = saved[split] if isinstance(saved, dict) else saved
        else:
            rows = datasets.load_dataset(str(path) if path.is_dir() else name, config, split=split)
    except JobError:
        raise
    except Exception as error:  # the hub, the network, the cache and the scripts behind it all raise their own
        raise JobError(
            f"{option}: {name} is not a file, and datasets cannot load it ({split} split): {first_sentence(error)}"
        ) from error
    yield from ((f"{name} ({split} split), row {i}", row) for i, row in enumerate(rows))


def _begins_with_bracket(path: Path) -> bool:
    with open(path, "rb") as file:
        while block := file.read(4096):
            if rest := block.removeprefix(b"\xef\xbb\xbf").lstrip():
                return rest.startswith(b"[")
    return False


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
