# SPDX-License-Identifier: Apache-2.0
"""What a merge writes of itself: sealed lists of files with sizes and SHA-256, and how a file is told from another one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..program.errors import FileError
from ..program.files import flush
from .json_text import read_bytes
from .safetensors_file import stamp_of

_MOST_BYTES = 16 << 20


def sha256_of(path: Path) -> str:
    value = hashlib.sha256()
    for block in blocks_of(path):
        value.update(block)
    return value.hexdigest()


def blocks_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file that is read, in blocks; a FileError where it cannot be."""
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                yield block
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error


def is_as_written(path: Path, entry: dict[str, Any], since: int) -> bool:
    """Whether a file is the one that ``entry`` describes: nothing has touched it after ``since``, or its digest is the same."""
    try:
        status = path.stat()
        if path.is_symlink() or not path.is_file() or status.st_size != entry["bytes"]:
            return False
        return status.st_ctime_ns <= since or sha256_of(path) == entry["sha256"]
    except (OSError, FileError):
        return False


def entry_of(path: Path) -> dict[str, Any]:
    """What an input is told by; its digest comes later."""
    try:
        stamp = stamp_of(path.stat())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    return {"bytes": stamp[0], "stamp": list(stamp), "sha256": None}


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` with a digest of itself, beside its place, flushed and renamed; on the disk when this returns."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps({**content, "seal": _seal(content)}, indent=2) + "\n", encoding="utf-8")
    flush(beside)
    os.replace(beside, path)
    flush(path.parent)


def read_sealed(path: Path, *more: str) -> dict[str, Any] | None:
    """What :func:`write_sealed` wrote; None where there is nothing, or it is not as it was written.

    It has request, inputs, outputs, and ``more``. The seal is no secret: names and entries are checked all the same.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(read_bytes(path, _MOST_BYTES))
        seal = content.pop("seal")
        written = [*content["outputs"].items(), *content.get("theirs", {}).items()]
        is_whole = (
            seal == _seal(content)
            and content.keys() >= {"request", "inputs", *more}
            and isinstance(content["request"], dict)
            and all(map(_is_inside, (name for name, _ in written)))
            and all(entry.keys() >= {"bytes", "sha256"} for _, entry in written)
            and all(entry.keys() >= {"bytes", "sha256", "stamp"} for entry in content["inputs"].values())
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    return content if is_whole else None


def _is_inside(name: str) -> bool:
    """Whether it is the name of a file in a folder, or in one below it, and leads to no hidden one, nor out of it."""
    return "\0" not in name and all(part and part[0] != "." for part in name.split("/"))


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
