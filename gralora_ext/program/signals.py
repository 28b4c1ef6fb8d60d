# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM and SIGHUP: the first stops the job in good order, the second at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import Stopped


class Stopper:
    """Turns the first signal into :class:`Stopped`: at once, or at the end of the outermost ``held()`` block.

    A held block is work that must not be torn (training steps, renames); it may look at ``signum`` to end sooner.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._depth = 0

    def install(self) -> None:
        self.signum, self._depth = None, 0
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup asks for SIGHUP to be ignored
            signal.signal(signal.SIGHUP, self._handle)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0:
            self.check()

    def check(self) -> None:
        """Raises Stopped where a signal has come: for the case that a library swallowed the one raised on arrival."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.signum is not None:
            os.write(2, b"\nstopped at once; the last checkpoint is whole\n")
            os._exit(128 + signum)
        self.signum = signum
        if self._depth:
            os.write(2, b"\nstopping after the step in hand; a second signal stops at once\n")
        else:
            raise Stopped(signum)


# A process has one set of signal handlers, hence one object.
stopper = Stopper()
