# SPDX-License-Identifier: Apache-2.0
"""The console of a process that is not the one to speak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .console import Bar, Console


class Silent(Console):
    """As a console, and nothing is to be seen."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, what: str, total: int, done: int = 0, *, first: bool = False) -> Iterator[Bar]:
        yield _NoBar(self, what, total, done, first)


class _NoBar(Bar):
    def __init__(self, *arguments: Any):
        pass

    def update(self, done: int, *notes: str) -> None:
        pass
