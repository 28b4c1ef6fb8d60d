# SPDX-License-Identifier: Apache-2.0
"""What the job tells while it runs: lines on stdout, and a progress bar where stderr is a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from .signals import reader_may_be_gone

LINE_SECONDS = 2.0  # without a terminal: the least time between two lines of progress
COLUMNS = 80  # what a line of progress fits into
_BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
_BESIDE_NOTES = 24  # of a bar: the least bar, times, and what stands between them


class Console:
    """Each line carries the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def stamp(self) -> str:
        return f"[{self.seconds:6.1f} s] "

    def say(self, text: str) -> None:
        with reader_may_be_gone(sys.stdout):
            tqdm.write(f"{self.stamp()}{text}", file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def bar(self, what: str, total: int, done: int = 0, *, first: bool = False) -> Iterator[Bar]:
        """Progress of ``what`` from ``done`` to ``total``; ``first``: where it is lines, the first step has one too."""
        bar = Bar(self, what, total, done, first)
        try:
            yield bar
        finally:
            if bar.shown:
                with reader_may_be_gone(sys.stderr):
                    bar.shown.close()


class Bar:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console, what: str, total: int, done: int, first: bool):
        self.console = console
        self.what, self.total, self.started_at = what, total, done
        self.start = time.perf_counter()
        self.last_line = 0.0 if first else self.start
        self.shown: tqdm | None = None
        if sys.stderr.isatty():
            # Some pseudo-terminals have no size: tqdm would then show nothing, and this says 80 x
            # 24.
            size = shutil.get_terminal_size()
            self.shown = tqdm(
                disable=False,  # TQDM_DISABLE is for the libraries' bars
                total=total,
                initial=done,
                desc=what,
                bar_format=_BAR,
                file=sys.stderr,
                leave=first,
                ncols=size.columns,
                nrows=size.lines,
                smoothing=0,  # the time left is from the mean speed: what was there already counts as no work
                miniters=1,
            )

    def update(self, done: int, *notes: str) -> None:
        """Shows that ``done`` of the total are done, with as many ``notes``, the first ones first, as fit into a line."""
        if self.shown is not None:
            room = (self.shown.ncols or COLUMNS) - len(f"{self.what} {self.total}/{self.total}") - _BESIDE_NOTES
            self.shown.set_postfix_str(_fitting(notes, room), refresh=False)
            with reader_may_be_gone(sys.stderr):
                self.shown.update(done - self.shown.n)
            return
        now = time.perf_counter()
        if now - self.last_line < LINE_SECONDS and not (notes and done == self.total):
            return
        self.last_line = now
        left = (now - self.start) / max(1, done - self.started_at) * (self.total - done)
        start, end = f"{self.what} {done}/{self.total}", f", {left:,.0f} s left" if left >= 1 else ""
        note = _fitting(notes, COLUMNS - len(self.console.stamp()) - len(f"{start}: {end}"))
        self.console.say(f"{start}{': ' + note if note else ''}{end}")


def _fitting(notes: Sequence[str], room: int) -> str:
    text = ", ".join(notes)
    return text if len(text) <= room or len(notes) < 2 else _fitting(notes[:-1], room)
