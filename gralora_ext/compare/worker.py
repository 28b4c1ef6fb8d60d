# SPDX-License-Identifier: Apache-2.0
"""``python -m gralora_ext.compare.worker``: one run in a process of its own, so that its peak of memory is its own.

It reads a task as JSON from its standard input, and leaves one JSON file, renamed into its place
when it is complete.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..program import machine
from ..program.errors import JobError, Stopped, stops_unwrapped
from ..program.files import PARTIAL, staged, write_json
from ..program.memory import keep_freed_memory
from ..program.resources import memory_failure
from ..program.signals import stopper
from .plan import MEASURE, Run, Settings
from .runner import RUNS

ROOT = Path(__file__).resolve().parents[2]


def run_of(values: dict[str, Any]) -> Run:
    return Run(**{**values, "settings": Settings(**values["settings"])})


def main() -> int:
    stopper.install()
    task = json.load(sys.stdin)
    try:
        folder = Path(task["folder"])
        with stops_unwrapped():
            record = measured(run_of(task["run"]), Path(task["texts"]), folder)
        with staged(folder / RUNS) as stage:
            write_json(stage / f"{record['name']}.json", record)
    except JobError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stop:
        return stop.exit_code
    except Exception as error:  # the process that started this one tells the last line
        if not (reason := memory_failure(error)):
            raise
        print(reason, file=sys.stderr)
        return 2
    return 0


def settings_of(options: Any) -> dict[str, Any]:
    """finetune's options as the run had them, without paths."""
    from ..cli.options import decisive, settings

    return {k: v for k, v in decisive(settings(options)).items() if k not in ("model", "data", "output")}


def measured(run: Run, texts: Path, folder: Path) -> dict[str, Any]:
    """Trains and measures: all that the run's file says. ``folder`` holds what is written on the way."""
    keep_freed_memory()
    import torch

    from .extras import EXTRAS
    from .job import RunJob
    from .progress import Progress

    if run.settings.threads:
        torch.set_num_threads(run.settings.threads)
    started, commit = time.perf_counter(), machine.commit(ROOT)  # of what was imported: a later commit is not
    progress = Progress(run.settings.batch_size)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as scratch:
        job = RunJob(run, texts, Path(scratch) / "job", progress)
        job.check()
        job.prepare()
        job.train()
        size = job.checkpoint_bytes(Path(scratch) / "saved") if run.part == MEASURE else None
    extra = EXTRAS[run.extra](job) if run.extra and job.diverged is None else None
    return {
        "name": run.name,
        "digest": run.digest,
        "run": run.decisive,
        "settings": settings_of(job.options),
        "texts": run.settings.texts,
        "results": {**job.results, "checkpoint_bytes": size, "seconds": time.perf_counter() - started},
        "losses": [{"step": e["step"], "loss": e["loss"]} for e in job.history.losses],
        "extra": extra,
        **stamp(job.device, commit),
    }


def stamp(device: str, commit: dict[str, Any]) -> dict[str, Any]:
    """When, where and with what a run was made; ``commit`` is that of its beginning."""
    import torch

    return {
        "git": commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine.machine(torch.cuda.get_device_name() if device == "cuda" else None),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # of the last minute, this run in it
        "waited": machine.waited(),
        "environment": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")},
    }


if __name__ == "__main__":
    sys.exit(main())
