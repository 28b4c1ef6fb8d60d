# SPDX-License-Identifier: Apache-2.0
"""How a run tells the process that started it how far it is: lines of numbers between those for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..program.console import Console
from .plan import PROGRESS, START_UNITS, STEP_UNITS

SECONDS = 0.3  # the least time between two such lines


class Progress(Console):
    """A console whose bars are such lines; ``rows_per_step`` tells how much work a step is."""

    def __init__(self, rows_per_step: int):
        super().__init__()
        self.rows_per_step = rows_per_step
        self.done = START_UNITS
        self.last = 0.0

    def say(self, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)

    @contextmanager
    def bar(self, what: str, total: int, done: int = 0, *, first: bool = False) -> Iterator[Any]:
        bar = _Counter(self, what, self.rows_per_step * STEP_UNITS if what == "step" else 1)
        yield bar
        self.done += bar.weight * total

    def tell(self, units: int, note: str) -> None:
        now = time.perf_counter()
        if now - self.last >= SECONDS:
            self.last = now
            print(f"{PROGRESS} {units} {note}", file=sys.stdout, flush=True)


class _Counter:
    """A bar of this run; an evaluation that a step of training ends with is within that step's bar."""

    def __init__(self, progress: Progress, what: str, weight: int):
        self.progress, self.what, self.weight = progress, what, weight
        self.before = progress.done

    def update(self, done: int, *notes: str) -> None:
        self.progress.tell(self.before + self.weight * done, ", ".join([f"{self.what} {done}", *notes]))
