"""Measuring the adapter path alone: forward, or forward and backward, of every contender on one shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from gralora_ext.cli.errors import first_sentence

from . import grid
from .accuracy import path_error
from .bench import Context, Task
from .data import Data
from .floor import pace_contender
from .levels import Level
from .peers import Path, compiled, paths
from .results import Record
from .shapes import Shape, forward_work, training_work
from .timing import Contender

# For the estimate only: seconds per element of x and y and per parameter that one call of a typical contender takes.
CALL_SECONDS = 2e-9
CASE_SECONDS = 0.1  # building the layers, and the reference in float64
COMPILE_SECONDS = 5.0
PACE = "pace"  # among the contenders
MEMORY_FACTOR = 4  # the peak of the hungriest contender (float32 copies beside 16-bit activations), in working sets


def task(
    bench: str, shape: Shape, level: Level, *, training: bool, compile_peft: bool = False, label: str = "", **extra: Any
) -> Task:
    """The task of timing ``shape``; ``compile_peft`` adds PEFT's layer under torch.compile.

    ``label`` begins the key where a bench meets a shape more than once; ``extra`` joins the record's case.
    """
    key = label + shape.key
    elements = shape.T * (shape.N + shape.M)
    call = CALL_SECONDS * (3 if training else 1) * (elements + shape.parameters)
    contenders = 5 + compile_peft
    seconds = CASE_SECONDS + 20 * CALL_SECONDS * elements + max(level.seconds, (level.rounds + 3) * contenders * call)
    return Task(
        f"{bench}: {key}",
        seconds + compile_peft * COMPILE_SECONDS,
        partial(measure, bench=bench, key=key, shape=shape, training=training, compile_peft=compile_peft, extra=extra),
        memory=MEMORY_FACTOR * training_work(shape).working_set,
    )


def grid_tasks(bench: str, training: bool, level: Level, threads: int, device: torch.device) -> list[Task]:
    """The tasks of ``bench`` on the whole grid of ``level``."""
    compiled = grid.compiled_shapes(level)
    return [
        task(bench, shape, level, training=training, compile_peft=shape in compiled) for shape in grid.shapes(level)
    ]


def measure(
    context: Context, *, bench: str, key: str, shape: Shape, training: bool, compile_peft: bool, extra: dict[str, Any]
) -> Iterator[Record]:
    data = Data(shape, context.device)
    contenders = paths(data)
    if compile_peft:
        _add_compiled(contenders, data, training, context)
    errors = {name: path_error(path, data, gradients=training) for name, path in contenders.items()}
    step = train if training else forward
    with torch.set_grad_enabled(training):
        calls: dict[Any, Contender] = {n: Contender(partial(step, path, data)) for n, path in contenders.items()}
        samples = context.interleave({**calls, PACE: pace_contender(context.device)})
    pace = context.floor.pace(samples.pop(PACE))
    work = training_work(shape) if training else forward_work(shape)
    yield Record(
        bench=bench,
        key=key,
        unit="s",
        samples=samples,
        case={**asdict(shape), **extra},
        errors=errors,
        work=work,
        least=context.floor.least_seconds(work),
        pace=pace,
    )


def _add_compiled(contenders: dict[str, Path], data: Data, training: bool, context: Context) -> None:
    """Compiles PEFT's layer by a call, so that its compile time is in no sample; where that fails, it stays out."""
    try:
        path = compiled(contenders["peft"])
        path_error(path, data, gradients=training)
    except Exception as error:  # noqa: BLE001  a compiler has many ways to fail; the other contenders stay
        context.skipped["torch.compile"] = first_sentence(error)
    else:
        contenders["peft-compiled"] = path


def forward(path: Path, data: Data) -> None:
    """y, with autograd off."""
    path.call(data.x, data.base)


def train(path: Path, data: Data) -> None:
    """y, dx and the gradients of all parameters. A call before may have drawn ``base`` into a graph: hence detached."""
    y = path.call(data.x, data.base.detach())
    torch.autograd.grad(y, (data.x, *path.parameters), data.grad)
