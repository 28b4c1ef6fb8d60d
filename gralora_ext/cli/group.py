# SPDX-License-Identifier: Apache-2.0
"""The processes of one job: what they tell each other, and how one's error or signal ends them all.

Each process goes through the same stages. They meet at the end of a stage, in
:meth:`Group.together`; between two meetings a process has no word of the others, but for the
collective operations of the training itself.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

from ..program.errors import JobError, Told, stops_unwrapped
from ..program.signals import output_is_gone, stopper
from .launcher import Place

TIMEOUT = 600.0  # seconds for which a process waits for the others, where --process-timeout says nothing
LOST = 75  # the exit code, under our own launcher, of a process that lost another: the launcher tells of it
_SILENCE = 10.0  # seconds in which a launcher has ended a job that lost a process
# What gloo, NCCL and torch's store say of a process that has gone or does not answer.
_GONE = re.compile(
    r"gloo|nccl|c10d|TCPStore|(?i:connection (was )?(closed|reset|refused)|broken pipe|timed out|socket)", re.ASCII
)


class Group:
    """All processes of the job, seen from one of them; a job of one process has a group of one, which needs no torch."""

    def __init__(self, place: Place):
        self.place = place
        self.engine = "ddp"  # how the processes share the model, see `launcher.engine`
        self.timeout = TIMEOUT
        self.joined = False
        self.agreed = False  # whether the signal in `stopper` is known to all

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    @property
    def is_first(self) -> bool:
        return self.place.is_first

    @property
    def shares_model(self) -> bool:
        """Whether a forward pass takes all processes."""
        return self.engine != "ddp"

    def join(self, cuda: bool) -> None:
        """Meets the others: gloo carries what is on the CPU, NCCL what is on CUDA devices."""
        if self.size == 1 or self.joined:
            return
        import torch

        if cuda:
            torch.cuda.set_device(self.place.local_rank)
        # A signal waits until they have met. A process that left half way would end after those
        # that have lost it, and they would be taken for the cause.
        with self.held():
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=self.timeout)
            )
            self.joined = True

    @contextmanager
    def together(self, *, meet: bool = True) -> Iterator[None]:
        """A stage of the job: a JobError in one process is one in all of them, and the first process tells it.

        Where the first process has it before it met the others, it does not wait for them: its
        launcher ends them. Without ``meet`` only an error makes a process look for the others.
        """
        error: JobError | None = None
        try:
            with stops_unwrapped():
                yield
        except JobError as own:
            error = own
        if self.size == 1 or (self.is_first and error is not None and not self.joined):
            if error is not None:
                raise error
            return
        if error is None and not meet:
            return
        if not self.joined:
            self.join(cuda=False)  # to tell the others takes no device
        errors = self.exchange(None if error is None else str(error))
        first = next(((rank, text) for rank, text in enumerate(errors) if text is not None), None)
        if first is None:
            return
        if not self.is_first:
            raise Told(0)
        rank, text = first
        raise JobError(text if rank == 0 else f"process {rank} of {self.size}: {text}") from error

    def exchange(self, value: Any) -> list[Any]:
        """The ``value`` of each process."""
        if self.size == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum over all processes of each of ``values``."""
        return [sum(column) for column in zip(*self.exchange(list(values)), strict=True)]

    def signal(self) -> int | None:
        """The signal that has come to any of the processes, which then has come to each. All of them call this.

        One that comes to this process meanwhile is told the next time, when the others learn of it.
        """
        if self.size == 1:
            return stopper.signum
        import torch

        largest = torch.tensor(stopper.signum or 0)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        signum = int(largest) or None
        if signum is not None:
            self.agreed = True
            stopper.learn(signum)
        return signum

    def check_signal(self) -> None:
        """Raises Stopped in all processes where a signal has come to any. All of them call this."""
        if self.signal() is not None:
            stopper.check()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Of several processes none is stopped alone in here: they agree on it, by :meth:`check_signal`."""
        with stopper.held() if self.size > 1 else nullcontext():
            yield

    def has_lost(self, error: BaseException) -> bool:
        """Whether ``error`` comes from another process that has ended or does not answer."""
        torch = sys.modules.get("torch")  # without it this process has met none
        if self.size == 1 or torch is None or (isinstance(error, BrokenPipeError) and output_is_gone()):
            return False
        kinds = (torch.distributed.DistError, ConnectionError)
        return isinstance(error, kinds) or (isinstance(error, RuntimeError) and bool(_GONE.search(str(error))))

    def leave_lost(self, sentence: str) -> NoReturn:
        """Ends this process at once after another was lost; the launcher tells of that, or else the first process."""
        if not self.place.of_our_launcher and self.is_first:
            stopper.quiet = True  # the launcher ends this process too, which is no news
            print(f"gralora-ext: error: {sentence}", file=sys.stderr)
        end_now(LOST if self.place.of_our_launcher else 1)


def is_joined() -> bool:
    """Whether this process has met others."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def end_by(signum: int) -> NoReturn:
    """Ends this process as ``signum`` does where nobody handles it, so that a launcher sees it."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    time.sleep(_SILENCE)
    end_now(128 + signum)


def end_now(code: int) -> NoReturn:
    """Ends this process without the end of torch's threads, which wait for processes that are gone, or abort."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
