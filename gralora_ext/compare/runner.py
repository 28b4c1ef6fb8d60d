# SPDX-License-Identifier: Apache-2.0
"""Runs that are not there yet are made, each by a process of its own; one bar over all of them. Needs no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cli.report import versions
from ..program.console import Bar, Console
from ..program.errors import JobError, clipped, stops_unwrapped
from ..program.files import LOCK, PARTIAL, locked, staged, write_json
from .plan import PROGRESS, Run
from .texts import Texts

SETTINGS = "settings.json"  # what the folder was made with; the mark of a folder of runs
RUNS, TEXTS, LOGS = "runs", "texts", "logs"
DECISIVE = ("gralora_ext", "torch", "transformers", "peft")  # packages whose versions all runs of a folder share
_ENDING_SECONDS = 60.0  # for a run that is told to end: the step in hand may take that long

Record = dict[str, Any]


class Runner:
    """The runs of one folder. ``record`` gives a run's file, and makes it where there is none that is whole."""

    def __init__(self, folder: Path, console: Console, bar: Bar):
        self.folder = folder.resolve()
        self.console = console
        self.bar = bar
        self.done = bar.started_at

    def record(self, run: Run, planned: bool = True) -> Record:
        """The run's file. ``planned`` says whether the bar's total has the run's work."""
        if not planned:
            self._set_total(self.bar.total + run.units)
        return self.kept(
            run.name, run.digest, run.units, lambda: self._make(run), lambda r: f"{run.words()}: {outcome(r)}"
        )

    def kept(
        self, name: str, digest: str, units: int, make: Callable[[], None], words: Callable[[Record], str]
    ) -> Record:
        """The file ``name``, which ``make`` leaves in ``runs/`` where it is not there whole, with this digest."""
        path = self.folder / RUNS / f"{name}.json"
        if (record := read_record(path, digest)) is not None:
            self._check_versions(record)
            self._leave_out(units)
        else:
            make()
            record = read_record(path, digest)
            if record is None:
                raise JobError(f"the run {name} ended without its file: {self.folder / LOGS} may tell why")
        self.done += units
        self.bar.update(self.done, words(record))
        return record

    def _check_versions(self, record: Record) -> None:
        """That a run which is there was made with the packages that are here: their numbers may differ."""
        here = versions()
        for name in DECISIVE:
            before, now = record["versions"].get(name), here.get(name)
            if before != now:
                raise JobError(
                    f"--output: {self.folder} has runs made with {name} {before}, and here is {now}: their losses are not "
                    f"comparable; choose another folder, or install {name}=={before}"
                )

    def _make(self, run: Run) -> None:
        task = {"run": asdict(run), "texts": str(self.folder / TEXTS), "folder": str(self.folder)}
        environment = {
            **os.environ,
            "HF_HUB_VERBOSITY": "error",
            "TQDM_DISABLE": "1",
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        }
        package = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        (self.folder / LOGS).mkdir(exist_ok=True)
        last, far = "", 0
        with (
            open(self._log(run), "w", 1, encoding="utf-8") as log,
            _child([sys.executable, "-m", "gralora_ext.compare.worker"], environment) as child,
        ):
            assert child.stdin is not None and child.stdout is not None
            with suppress(BrokenPipeError):  # it has ended already, and its output tells why
                child.stdin.write(json.dumps(task))
                child.stdin.close()
            for line in child.stdout:
                if line.startswith(f"{PROGRESS} "):
                    _, units, note = line.rstrip().split(" ", 2)
                    far = max(far, min(int(units), run.units))  # an evaluation within training counts from before it
                    self.bar.update(self.done + far, f"{run.words()}: {note}")
                else:
                    log.write(line)
                    last = line.strip() or last
            code = child.wait()
        if code:
            ended = f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
            why = clipped(last, 300) if code > 0 and last else ended
            raise JobError(f"the run {run.name} failed: {why}; its output is in {self._log(run)}")

    def _log(self, run: Run) -> Path:
        return self.folder / LOGS / f"{run.name}.log"

    def _leave_out(self, units: int) -> None:
        """What was there takes no time, so that the time left must not count it as work."""
        self.bar.started_at += units
        if self.bar.shown is not None:
            self.bar.shown.initial += units

    def _set_total(self, total: int) -> None:
        self.bar.total = total
        if self.bar.shown is not None:
            self.bar.shown.total = total


@contextmanager
def running(folder: Path, settings: dict[str, Any], texts: Texts, total: int, what: str) -> Iterator[Runner]:
    """A runner in ``folder``, which no other process writes into meanwhile; the texts lie there, and the settings."""
    console = Console()
    check_folder(folder)
    with stops_unwrapped(), locked(folder, wait=False), locked(folder / RUNS, wait=False):
        texts.write(folder / TEXTS)
        with staged(folder) as stage:
            write_json(stage / SETTINGS, settings)
        with console.bar(what, total, first=True) as bar:
            yield Runner(folder, console, bar)


def check_folder(folder: Path) -> None:
    """That ``folder`` is empty, or holds runs."""
    if folder.exists() and not folder.is_dir():
        raise JobError(f"--output: {folder} is not a folder")
    if folder.is_dir() and not _are_settings(folder / SETTINGS):
        others = [p.name for p in sorted(folder.iterdir()) if p.name != LOCK and not p.name.startswith(PARTIAL)]
        if [name for name in others if name not in (RUNS, TEXTS)]:
            raise JobError(f"--output: {folder} holds other files ({others[0]}), and no runs of gralora-ext")


def _are_settings(path: Path) -> bool:
    """Whether ``path`` is what :func:`running` writes: other programs have files of that name too."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and {"quick", "seeds", "validation_rows"} <= said.keys()


def read_record(path: Path, digest: str) -> Record | None:
    """The run's file, if it is there, whole, and of a run with these settings."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("digest") == digest else None


def outcome(record: Record) -> str:
    loss = record["results"]["loss"]
    return "diverged" if loss is None else f"loss {loss:.4f}"


@contextmanager
def _child(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block."""
    with subprocess.Popen(
        command,
        env=environment,
        text=True,
        errors="replace",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(_ENDING_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
