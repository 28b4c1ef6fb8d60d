# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM and SIGHUP: the first stops the job in good order, the second at once."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from .errors import Stopped

_SIGNAL_SECONDS = 0.1  # a pipe's end is seen before the signal that goes with it, which comes within this time
ONE_SIGNAL_SECONDS = 2.0  # of several processes: within these a second signal is the first one once more


class Stopper:
    """Turns the first signal into :class:`Stopped`: at once, or at the end of the outermost ``held()`` block.

    A held block is work that must not be torn (training steps, renames); it may look at ``signum`` to end sooner.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.quiet = False
        self._depth = 0
        self._came, self._again = 0.0, 0.0

    def install(self) -> None:
        self.signum, self.quiet, self._depth, self._again = None, False, 0, 0.0
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup asks for SIGHUP to be ignored
            signal.signal(signal.SIGHUP, self._handle)

    def share(self, *, first: bool) -> None:
        """For one of several processes: only the ``first`` one speaks, and a signal that comes twice at once is one.

        A terminal sends its Ctrl-C to launcher and processes, and the launcher passes it on.
        """
        self.quiet, self._again = not first, ONE_SIGNAL_SECONDS

    def learn(self, signum: int) -> None:
        """Takes a signal for one that came here; what to do about it is the caller's."""
        self.signum, self._came = signum, time.monotonic()

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
            if time.monotonic() - self._came < self._again:
                return
            self._tell(b"\nstopped at once; what was finished is whole\n")
            os._exit(128 + signum)
        self.learn(signum)
        for stream in (1, 2):
            if _is_gone(stream):
                silence(stream)  # for libraries that write there too
        if self._depth:
            self._tell(b"\nstopping after the step in hand; a second signal stops at once\n")
        else:
            raise Stopped(signum)

    def _tell(self, text: bytes) -> None:
        if not self.quiet:
            with suppress(OSError):  # the terminal may be what has gone
                os.write(2, text)


# A process has one set of signal handlers, hence one object.
stopper = Stopper()


@contextmanager
def reader_may_be_gone(stream: TextIO) -> Iterator[None]:
    """A block that writes to ``stream``: where its reader has gone and a signal has come, output is lost from then on.

    Without a signal the error is raised.
    Ctrl-C ends the reader of a pipe too, and a terminal that is closed sends SIGHUP: the job must
    still save what it has.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        time.sleep(_SIGNAL_SECONDS)
        if stopper.signum is None:
            raise
        silence(stream.fileno())


def _is_gone(descriptor: int) -> bool:
    """Whether the terminal, or the reader of the pipe, that ``descriptor`` writes to has gone."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def output_is_gone() -> bool:
    """Whether the reader of what this process prints, on stdout or stderr, has gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # a stream of Python's own has no descriptor
            if _is_gone(stream.fileno()):
                return True
    return False


def silence(descriptor: int) -> None:
    """Has what is written to ``descriptor`` from now on lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
