# SPDX-License-Identifier: Apache-2.0
"""The adapter path alone: forward, forward + backward, over the number of threads, as a size grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from gralora_ext.program.errors import first_sentence

from .bench import Bench, Context, Level, Task
from .contenders import Data, Path, compiled, path_error, paths
from .machine import measure_floor, pace_contender
from .results import Record
from .shapes import SQUARE, Shape, compiled_shapes, forward_work, shapes, training_work
from .timing import Contender

# For the estimate only: seconds per element of x and y and per parameter that one call of a typical
# contender takes.
CALL_SECONDS = 2e-9
CASE_SECONDS = 0.1  # building the layers, and the reference in float64
COMPILE_SECONDS = 5.0
PACE = "pace"  # among the contenders
MEMORY_FACTOR = 4  # the peak of the hungriest contender (float32 copies beside 16-bit activations), in working sets


def task(
    bench: str, shape: Shape, level: Level, *, training: bool, compile_peft: bool = False, label: str = "", **extra: Any
) -> Task:
    """The task of timing ``shape``; ``compile_peft`` adds PEFT's layer under torch.compile.

    ``label`` begins the key where a bench meets a shape more than once; ``extra`` joins the
    record's case.
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
    compiled = compiled_shapes(level.name)
    return [
        task(bench, shape, level, training=training, compile_peft=shape in compiled) for shape in shapes(level.name)
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


# Over the number of threads: 1, 2, 4, …; the floor is measured anew for each.

THREAD_SHAPES = {
    "tiny": [Shape(24, 36, T=3, r=4)],
    "quick": [SQUARE],
    "default": [SQUARE, Shape(4096, 4096, T=2048)],
    "full": [replace(SQUARE, T=1), SQUARE, Shape(4096, 4096, T=2048)],
}


def threads_tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    if device.type != "cpu":
        return []
    shapes_of_level = THREAD_SHAPES[level.name]
    return [thread_task(level, n, threads, shape) for shape in shapes_of_level for n in thread_counts(threads)]


def thread_counts(threads: int) -> list[int]:
    """The powers of two below ``threads``, and ``threads``."""
    return [*(2**i for i in range((threads - 1).bit_length())), threads]


def thread_task(level: Level, count: int, threads: int, shape: Shape) -> Task:
    inner = task("threads", shape, level, training=True, label=f"threads={count}: ", threads=count)
    floor_seconds = min(1.0, level.seconds)
    slower = threads / count  # the estimate of the layer path is for all threads
    return replace(
        inner, seconds=inner.seconds * slower + floor_seconds, run=partial(measure_threads, inner, count, floor_seconds)
    )


def measure_threads(inner: Task, count: int, floor_seconds: float, context: Context) -> Iterator[Record]:
    torch.set_num_threads(count)
    try:
        floor = measure_floor(context.device, floor_seconds)
        yield from inner.run(replace(context, floor=floor, threads=count))
    finally:
        torch.set_num_threads(context.threads)


# How the time grows as T, N = M, r or k doubles, all else as it is.

AXES = {
    "T": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "N": (512, 1024, 2048, 4096, 8192),
    "r": (8, 16, 32, 64, 128),
    "k": (1, 2, 4, 8, 16),
}
STRIDES = {"quick": 2, "default": 1, "full": 1}  # quick takes every second point


def growth_tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    if level.name == "tiny":
        points = [("T", 2, Shape(24, 36, T=2, r=4)), ("T", 4, Shape(24, 36, T=4, r=4))]
    else:
        stride = STRIDES[level.name]
        points = [(axis, value, point(axis, value)) for axis, values in AXES.items() for value in values[::stride]]
    return [
        task("growth", shape, level, training=True, label=f"{axis}: ", axis=axis, value=value)
        for axis, value, shape in points
    ]


def point(axis: str, value: int) -> Shape:
    return replace(SQUARE, N=value, M=value) if axis == "N" else replace(SQUARE, **{axis: value})


BENCHES = (
    Bench("forward", "Forward of the adapter path", partial(grid_tasks, "forward", False)),
    Bench("training", "Forward + backward of the adapter path", partial(grid_tasks, "training", True)),
    Bench("threads", "Forward + backward of the adapter path over the number of threads", threads_tasks),
    Bench("growth", "Growth of forward + backward over T, N = M, r and k", growth_tasks),
)
