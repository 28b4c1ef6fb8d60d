# SPDX-License-Identifier: Apache-2.0
"""How the words of an option are read, the same on the command line and in a file. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..program.errors import clipped

LARGEST = 2**31 - 1  # what the libraries below take as a count
LARGEST_SEED = 2**32 - 1  # numpy's
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Kind:
    """``read`` makes a value of one word, or raises a ValueError that says what was expected.

    ``metavar`` stands for a word in the help. Where ``many`` is set, an option takes several words, and ``join`` makes
    one value of theirs. ``group`` says that a file may give names and values.
    """

    read: Callable[[str], Any]
    metavar: str | None = None
    many: bool = False
    join: Callable[[list[Any]], Any] = list
    group: bool = False
    is_switch: bool = False

    def of_file(self, value: Any) -> Any:
        """What a file's ``value`` stands for.

        Raises a ValueError where it is none of this kind, and a TypeError where it is a group.
        """
        if isinstance(value, dict) and self.group and all(map(_is_flat, value.values())):
            return self.join([self.read(json.dumps({str(name): v for name, v in value.items()}))])
        if isinstance(value, list) and self.many and value and not any(isinstance(v, (list, dict)) for v in value):
            return self.join([self.read(_word(v)) for v in value])
        if value in ([], {}):
            raise ValueError("expected a value, got an empty group")
        if isinstance(value, (list, dict)):
            raise TypeError("is a single value, not a group")
        return self.join([self.read(_word(value))]) if self.many else self.read(_word(value))


def _is_flat(value: Any) -> bool:
    """Whether ``value`` is a word, or a list of words: a file may refer to a few groups a billion times."""
    return not isinstance(value, dict) and not (
        isinstance(value, list) and any(isinstance(v, (list, dict)) for v in value)
    )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _text(word: str) -> str:
    if not word.strip():
        raise ValueError("expected a text, got an empty one")
    return word


def _boolean(word: str) -> bool:
    if word.lower() not in _TRUE + _FALSE:
        raise ValueError(f"expected true or false, got '{clipped(word)}'")
    return word.lower() in _TRUE


def whole(least: int, most: int = LARGEST) -> Kind:
    def read(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            value = most + 1 if word.isdecimal() else least - 1  # Python reads no number of thousands of digits
        if not least <= value <= most:
            bound = f"most {most}" if value > most else f"least {least}"
            raise ValueError(f"expected a whole number of at {bound}, got '{clipped(word)}'")
        return value

    return Kind(read, "N")


def real(test: Callable[[float], bool], expected: str) -> Kind:
    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = float("nan")
        if not test(value):
            raise ValueError(f"expected {expected}, got '{clipped(word)}'")
        return value

    return Kind(read, "X")


def choice(*names: str, **also: str) -> Kind:
    """One of ``names``; ``also`` are other words for some of them."""

    def read(word: str) -> str:
        if also.get(word, word) not in names:
            raise ValueError(f"invalid choice: '{clipped(word)}' (choose from {', '.join(names)})")
        return also.get(word, word)

    return Kind(read, "{" + ",".join(names) + "}" if len(names) < 5 else "NAME")


def either(kind: Kind, **words: Any) -> Kind:
    """What ``kind`` reads, or one of ``words``, which stand for their values."""

    def read(word: str) -> Any:
        if word.lower() in words:
            return words[word.lower()]
        try:
            return kind.read(word)
        except ValueError as error:
            raise ValueError(f"{error}; {' or '.join(words)} may be given too") from None

    return Kind(read, kind.metavar)


def several(kind: Kind, metavar: str | None = None) -> Kind:
    return Kind(kind.read, metavar or kind.metavar, many=True)


def mapping(kind: Kind) -> Kind:
    """``NAME=VALUE`` words, or one JSON object; ``kind`` reads the values."""

    def read(word: str) -> dict[str, Any]:
        if word.lstrip().startswith("{"):
            values = _json(word)
        else:
            name, equals, value = word.rpartition("=")
            values = {name: value} if equals and name else None
        if not values:
            raise ValueError(f"expected NAME={kind.metavar} or a JSON object, got '{clipped(word)}'")
        return {name: kind.read(_word(value)) for name, value in values.items()}

    return Kind(read, f"NAME={kind.metavar}", many=True, join=_merged, group=True)


def indices() -> Kind:
    """Whole numbers, or one JSON object from names to lists of them."""
    number = whole(0)

    def read(word: str) -> Any:
        if not word.lstrip().startswith("{"):
            return number.read(word)
        values = _json(word)
        if not values or not all(isinstance(v, list) and v for v in values.values()):
            raise ValueError(f"expected whole numbers, or names with lists of them, got '{clipped(word)}'")
        return {name: [number.read(_word(v)) for v in value] for name, value in values.items()}

    def join(values: list[Any]) -> Any:
        return _merged(values) if all(isinstance(v, dict) for v in values) else values

    return Kind(read, "N", many=True, join=join, group=True)


def _json(word: str) -> dict[str, Any] | None:
    try:
        values = json.loads(word)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _merged(values: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for part in values for name, value in part.items()}


TEXT = Kind(_text, "NAME")
SWITCH = Kind(_boolean, is_switch=True)
POSITIVE = real(lambda v: 0 < v < float("inf"), "a positive number")
NOT_NEGATIVE = real(lambda v: 0 <= v < float("inf"), "a number of at least 0")
PROBABILITY = real(lambda v: 0 <= v < 1, "a number of at least 0 and below 1")
