"""The ways in which a command ends early."""

from __future__ import annotations

import signal


class JobError(Exception):
    """What the user can mend, said in one sentence; the command prints it on stderr and exits with code 2."""


class Diverged(Exception):
    """The model no longer computes finite numbers; the job ends here, and writes what it has."""


class Stopped(BaseException):
    """A signal asked the job to stop. A BaseException, so that no library's ``except Exception`` swallows it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum

    @property
    def name(self) -> str:
        return "Ctrl-C" if self.signum == signal.SIGINT else signal.Signals(self.signum).name

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


def first_sentence(error: BaseException, limit: int = 300) -> str:
    """The first paragraph of an error's text on one line, so that a library's long message fits into one of ours."""
    text = " ".join(str(error).strip().split("\n\n")[0].split())
    return (text[:limit] + "…" if len(text) > limit else text) or type(error).__name__
