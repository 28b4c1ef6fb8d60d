# SPDX-License-Identifier: Apache-2.0
"""JSON from files that may be anything: read whole where it is short, and member by member where it may be long.

Python's parser makes 20 times as much memory of text that is nothing but brackets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from ..program.errors import FileError

MOST_CONFIG_BYTES = 2 << 20
MOST_TEXTS = 150_000  # of an object; the largest models have 100,000 tensors
_SPACE = re.compile(r"[ \t\n\r]*")


class Malformed(Exception):
    """What is wrong with a text, as the end of a sentence that begins with the file."""


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a file of at most ``most``; a FileError where it cannot be read, or is longer."""
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is not a file: expected one, and no folder, pipe or device")
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise FileError(
            f"{path} has more than {most:,} bytes: expected a file as a model's or an adapter's folder has it"
        )
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a short file; a FileError where it is none, or has a key twice."""
    try:
        value = json.loads(read_bytes(path, MOST_CONFIG_BYTES).decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"{error}"[:200]
        raise FileError(f"{path} is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a {type(value).__name__}: expected an object of settings")
    return value


def each_member(text: str, at: int, take: Callable[[str, int], int]) -> int:
    """Calls ``take(key, place behind its colon)``, which returns the place behind the value, for the object at ``at``.

    Returns the place behind the object. Whether a key may come twice is for ``take`` to say.
    """
    at = expect(text, at, "{")
    first = True
    while not is_next(text, at, "}"):
        at = at if first else expect(text, at, ",")
        first = False
        key, at = string(text, at)
        at = take(key, expect(text, at, ":"))
    return expect(text, at, "}")


def read_texts(text: str, at: int) -> tuple[dict[str, str], int]:
    """The object at ``at`` whose values are all texts, and the place behind it."""
    values: dict[str, str] = {}
    interned: dict[str, str] = {}

    def take(key: str, at: int) -> int:
        if key in values:
            raise Malformed(f"has {key[:80]!r} twice")
        if len(values) == MOST_TEXTS:
            raise Malformed(f"has more than {MOST_TEXTS:,} entries")
        value, at = string(text, at)
        values[key] = interned.setdefault(value, value)
        return at

    return values, each_member(text, at, take)


def string(text: str, at: int) -> tuple[str, int]:
    at = expect(text, at, '"')
    try:
        value, at = scanstring(text, at, True)
        value.encode()  # a half of a surrogate pair is no text that could be written again
    except ValueError:
        raise Malformed(f"has a text that is not JSON's at character {at}") from None
    return value, at


def skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def is_next(text: str, at: int, character: str) -> bool:
    return text.startswith(character, skip(text, at))


def expect(text: str, at: int, character: str) -> int:
    at = skip(text, at)
    if not text.startswith(character, at):
        raise Malformed(f"is not JSON: expected {character!r} at character {at}")
    return at + 1


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"it has {key[:80]!r} twice")
        values[key] = value
    return values
