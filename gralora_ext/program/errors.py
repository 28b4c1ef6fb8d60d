# SPDX-License-Identifier: Apache-2.0
"""The ways in which a command ends early."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class JobError(Exception):
    """What the user can mend, said in one sentence; the command prints it on stderr and exits with code 2."""


class FileError(JobError, ValueError):
    """A JobError of a function that Python programs call too, about a file or a value of the caller's: for them, a ValueError."""


class Told(Exception):
    """Another process of the job tells why it ends; this one ends with ``code`` and is silent."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class Diverged(Exception):
    """The model no longer computes finite numbers; the job ends here, and writes what it has."""


class Stopped(BaseException):
    """A signal asked the job to stop. A BaseException, so that no library's ``except Exception`` swallows it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum

    @property
    def name(self) -> str:
        return signal_name(self.signum)

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


@contextmanager
def stops_unwrapped() -> Iterator[None]:
    """A block that raises :class:`Stopped` again where other code has caught it and raised another exception from it.

    Python 3.11 does so where it comes while a class is made, as during imports, and so do libraries
    that import lazily.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Stopped):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def signal_name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def first_sentence(error: BaseException, limit: int = 300) -> str:
    """The first paragraph of an error's text on one line, so that a library's long message fits into one of ours."""
    text = " ".join(str(error).strip().split("\n\n")[0].split())
    return (text[:limit] + "…" if len(text) > limit else text) or type(error).__name__


def clipped(text: str, limit: int = 60) -> str:
    """``text`` if it is short, else its beginning."""
    return text if len(text) <= limit else text[:limit] + "…"


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint at the one of ``known`` that ``word`` is most like, to be put behind a sentence; empty where none is."""
    found = difflib.get_close_matches(word[:80], sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {prefix}{found[0]}?)" if found else ""
