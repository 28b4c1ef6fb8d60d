# SPDX-License-Identifier: Apache-2.0
"""A run of the suite: plan, estimate, floor, one task after the other, and what is left of it in a folder."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gralora_ext import build_info
from gralora_ext._loader import is_of_other_sources
from gralora_ext.cli.checks import quiet_libraries
from gralora_ext.program import machine
from gralora_ext.program.console import Console
from gralora_ext.program.errors import JobError, first_sentence
from gralora_ext.program.files import staged
from gralora_ext.program.memory import keep_freed_memory

from . import layer, memory, merge, mixed, model, path, plots, results
from .bench import LEVELS, Bench, Context, Level, Skip, Task
from .machine import measure_floor
from .tables import number, table

FLOOR_SECONDS = 2.0
OUT = Path("runs/benchmarks")
ROOT = Path(__file__).resolve().parent.parent

BENCHES = {
    bench.name: bench
    for bench in (*path.BENCHES, *layer.BENCHES, merge.BENCH, memory.BENCH, mixed.BENCH, *model.BENCHES)
}

Plan = list[tuple[Bench, list[Task]]]


def run(options: argparse.Namespace) -> int:
    """Measures what ``options`` ask for; returns 0, 1 where a case failed, 130 where the run was stopped.

    Raises:
        JobError: nothing can be measured here, or the folder cannot be written.
    """
    device = _device(options.device)
    _refuse_stale_extension()
    quiet_libraries()
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    level = LEVELS[options.level]
    plan = make_plan(options.only, level, threads, device)
    console = Console()
    cases = sum(len(tasks) for _, tasks in plan)
    console.say(
        f"{cases} cases, {threads} threads, {device}: about {_duration(FLOOR_SECONDS + expected_seconds(plan))}"
    )

    # For all contenders alike: by default each pays page faults for what the one before gave back.
    kept = keep_freed_memory()
    content = _header(options, device, threads, kept)
    folder = options.out or OUT / f"{time.strftime('%Y-%m-%dT%H%M')}-{machine.slug(content['machine'])}"
    with staged(folder):
        pass  # whether it can be written shows now, and not after an hour
    floor = measure_floor(device, min(FLOOR_SECONDS, level.seconds))
    console.say(
        f"floor: fp32 GEMM {number(floor.gemm / 1e9)} GFLOP/s, "
        f"memory in cache {number(floor.cached.best / 1e9)} GB/s, out of cache {number(floor.large.best / 1e9)} GB/s"
    )
    content["floor"] = floor.as_dict()
    context = Context(device, level, floor, threads, content["skipped"])
    # A polite kill keeps what was measured, as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _measure(plan, context, content, console, folder)
        content["complete"] = True
    except KeyboardInterrupt:
        console.say("stopped; what has been measured is kept")
    finally:
        signal.signal(signal.SIGTERM, before)
    return _finish(content, console, folder)


def _refuse_stale_extension() -> None:
    """The results would be told of the checkout's commit, and be another one's."""
    info = build_info()
    if info["build"] == "prebuilt" and is_of_other_sources(Path(info["path"])):
        raise JobError(
            f"the extension in use, {info['path']}, was built from other sources than the checkout's: build it first"
        )


def _header(options: argparse.Namespace, device: torch.device, threads: int, kept: bool) -> dict[str, Any]:
    """The content of the JSON file before anything is measured."""
    return {
        "format": results.FORMAT,
        "complete": False,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine.machine(torch.cuda.get_device_name() if device.type == "cuda" else None),
        "versions": machine.versions(),
        "git": machine.commit(ROOT),
        "benches": list(options.only),
        "settings": {
            "level": options.level,
            "device": device.type,
            "threads": threads,
            "malloc": "keeps freed memory" if kept else "as the system has it",
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        },
        "floor": {},
        "skipped": {},
        "failed": {},
        "records": [],
    }


def _finish(content: dict[str, Any], console: Console, folder: Path) -> int:
    """Writes the results and the plots; returns the exit code."""
    for what, reason in content["skipped"].items():
        console.say(f"left out: {what}: {reason}")
    if content["complete"] and not content["records"] and not content["failed"]:
        raise JobError(f"nothing was measured: {'; '.join(content['skipped'].values())}")
    written = [results.save(content, folder), *plots.draw(content, folder)]
    console.say(f"written: {', '.join(path.name for path in written)} in {folder}")
    if not content["complete"]:
        return 130
    return 1 if content["failed"] else 0


def _device(name: str) -> torch.device:
    if name == "cuda":
        if not torch.cuda.is_available():
            raise JobError("--device cuda: torch sees no CUDA device here")
        if not build_info()["cuda_archs"]:
            raise JobError("--device cuda: gralora_ext was built without CUDA kernels")
    if problem := build_info()["problem"]:
        raise JobError(problem)
    return torch.device(name)


def make_plan(names: Iterable[str], level: Level, threads: int, device: torch.device) -> Plan:
    """The benches of these names with their tasks."""
    return [(BENCHES[name], BENCHES[name].tasks(level, threads, device)) for name in names]


def expected_seconds(plan: Plan) -> float:
    return sum(task.seconds for _, tasks in plan for task in tasks)


def _measure(plan: Plan, context: Context, content: dict[str, Any], console: Console, folder: Path) -> None:
    """Runs all tasks; prints and saves after each bench, so that a killed process loses one bench at most."""
    total, done = expected_seconds(plan), 0.0
    with console.bar("benchmarks", 100) as bar:
        for bench, tasks in plan:
            first = len(content["records"])
            try:
                for task in tasks:
                    bar.update(int(100 * done / total), task.key)
                    _run(task, context, content, console)
                    done += task.seconds
            finally:
                records = content["records"][first:]
                if records:
                    tqdm.write(f"\n{bench.title}\n\n{table(records)}\n", file=sys.stdout)
                    results.save(content, folder)
        bar.update(100)


def _run(task: Task, context: Context, content: dict[str, Any], console: Console) -> None:
    if task.memory > (available := machine.available_memory()):
        context.skipped[task.key] = f"needs about {task.memory >> 20:,} MiB, and {available >> 20:,} are free"
        return
    try:
        for record in task.run(context):
            content["records"].append(record.as_dict())
    except Skip as reason:
        context.skipped[task.key] = str(reason)
    except Exception as error:  # noqa: BLE001  one case that fails must not cost the others
        content["failed"][task.key] = f"{type(error).__name__}: {first_sentence(error)}"
        console.say(f"failed: {task.key}: {content['failed'][task.key]}")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
