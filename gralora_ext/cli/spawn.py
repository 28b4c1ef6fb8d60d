# SPDX-License-Identifier: Apache-2.0
"""``--num-processes``: starts the processes of a job here, and ends them all when one ends badly. Needs no torch.

torchrun does the same; this one needs no second import of torch, keeps the job's exit codes, and
says in one sentence which process was lost.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..program.errors import JobError, signal_name
from ..program.files import CHECKPOINTS
from .checkpoints import Checkpoints
from .checks import command
from .group import LOST
from .launcher import LAUNCHED
from .options import SETTINGS

_GRACE = 2.0  # seconds in which the others may end after one has ended badly; they have nothing left to save
_STOP_GRACE = 30.0  # the same after a signal, where one has ended and the others may still be at work
_POLL = 0.05


def launch(options: argparse.Namespace, words: list[str]) -> int:
    """Runs ``gralora-ext finetune WORDS`` in several processes; returns the exit code of the job."""
    environment, size = dict(os.environ), options.num_processes
    if options.accelerate_config is not None:
        from .accelerate_file import read

        environment, size = read(Path(options.accelerate_config), size)
    if size == 1:
        raise JobError(
            "--accelerate-config: with one process, by the file's num_processes or --num-processes, nothing can be shared out: "
            "start two or more, or leave the file out"
        )
    return _Launch(options, words, environment, size).run()


class _Launch:
    def __init__(self, options: argparse.Namespace, words: list[str], environment: dict[str, str], size: int):
        self.options = options
        self.size = size
        self.checkpoints = Checkpoints(Path(options.output) / CHECKPOINTS, lambda text: None)
        self.before = {} if options.resume else self._seals()
        self.stop: int | None = None  # the signal that has come here and was passed on
        program = [sys.argv[0]] if Path(sys.argv[0]).name == "gralora-ext" else ["-m", "gralora_ext"]
        self.command = [sys.executable, *program, "finetune", *words]
        self.environment = {
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // size)),
            "GLOO_SOCKET_IFNAME": "lo",
            **environment,
            LAUNCHED: "1",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }

    def run(self) -> int:
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {s: signal.getsignal(s) for s in signals}
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for signum in signals:
                if signum != signal.SIGHUP or handlers[signum] != signal.SIG_IGN:  # as nohup asks for, see Stopper
                    signal.signal(signum, self._pass_on)
            for rank in range(self.size):
                self._start(rank)
            rank, code = self._wait()
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        return self._outcome(rank, code)

    def _start(self, rank: int) -> None:
        # In a session of its own a process does not get the Ctrl-C of the terminal beside the one
        # that is passed on.
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        self.processes.append(subprocess.Popen(self.command, env={**self.environment, **place}, start_new_session=True))
        if self.stop is not None:  # it came while this one was being started
            self.processes[-1].send_signal(self.stop)

    def _pass_on(self, signum: int, frame: Any) -> None:
        self.stop = signum
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signum)

    def _wait(self) -> tuple[int, int]:
        """The process that is the cause where one ended badly, and how; the first one and 0 where none did."""
        failed: tuple[int, int] | None = None
        end = float("inf")
        while True:
            codes = [process.poll() for process in self.processes]
            bad = [(rank, code) for rank, code in enumerate(codes) if code]
            # One that has lost another is never the cause; its cause may need a moment more to end.
            if bad and (failed is None or failed[1] == LOST):
                if failed is None:
                    end = time.monotonic() + (_GRACE if self.stop is None else _STOP_GRACE)
                failed = min(bad, key=lambda e: (e[1] == LOST, e[1] > 0, e[0]))
            if all(code is not None for code in codes):
                return failed or (0, 0)
            if time.monotonic() > end:
                return self._end(failed or (0, 0))
            time.sleep(_POLL)

    def _end(self, failed: tuple[int, int]) -> tuple[int, int]:
        """Kills those that are left. Where the first failure was that one did not answer, it is among them."""
        stuck = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
        for rank in stuck:
            self.processes[rank].kill()
        for process in self.processes:
            process.wait()
        return (stuck[0], LOST) if failed[1] == LOST else failed

    def _outcome(self, rank: int, code: int) -> int:
        if code >= 0 and code != LOST:
            return code  # the process has told why
        first = self.processes[0].returncode
        if self.stop is not None and first >= 0 and first != LOST:
            return first or 128 + self.stop
        if code < 0:
            what = f"was ended by {signal_name(-code)}"
        elif self.processes[rank].returncode == LOST:
            what = "has lost its connection to the others"
        else:
            what = f"did not answer for {self.options.process_timeout} s"
        print(f"gralora-ext: error: process {rank} of {self.size} {what}: {self._how_to_go_on()}", file=sys.stderr)
        return 1 if code == LOST else 128 - code

    def _how_to_go_on(self) -> str:
        written = {path: seal for path, seal in self._seals().items() if self.before.get(path) != seal}
        try:
            newest = self.checkpoints.newest_whole() if written else None
        except JobError:
            newest = None
        if newest is None or newest not in written:
            return "nothing has been saved yet; run the same command again"
        file = Path(self.options.output) / SETTINGS
        return f"{newest} is saved; go on with `{command()} finetune --config {shlex.quote(str(file))} --resume`"

    def _seals(self) -> dict[Path, int]:
        """When the manifest of each checkpoint was written."""
        return {p.parent: p.stat().st_mtime_ns for p in self.checkpoints.folder.glob("checkpoint-*/manifest.json")}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
