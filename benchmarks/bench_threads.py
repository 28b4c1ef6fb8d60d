"""Forward + backward of the adapter path on 1, 2, 4, … threads; the floor is measured anew for each number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from . import layer_path
from .bench import Bench, Context, Task
from .floor import measure_floor
from .grid import SQUARE
from .levels import Level
from .results import Record
from .shapes import Shape

NAME = "threads"
SHAPES = {
    "tiny": [Shape(24, 36, T=3, r=4)],
    "quick": [SQUARE],
    "default": [SQUARE, Shape(4096, 4096, T=2048)],
    "full": [replace(SQUARE, T=1), SQUARE, Shape(4096, 4096, T=2048)],
}


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    if device.type != "cpu":
        return []
    return [task(level, count, threads, shape) for shape in SHAPES[level.name] for count in thread_counts(threads)]


def thread_counts(threads: int) -> list[int]:
    """The powers of two below ``threads``, and ``threads``."""
    return [*(2**i for i in range((threads - 1).bit_length())), threads]


def task(level: Level, count: int, threads: int, shape: Shape) -> Task:
    inner = layer_path.task(NAME, shape, level, training=True, label=f"threads={count}: ", threads=count)
    floor_seconds = min(1.0, level.seconds)
    slower = threads / count  # the estimate of the layer path is for all threads
    return replace(
        inner, seconds=inner.seconds * slower + floor_seconds, run=partial(measure, inner, count, floor_seconds)
    )


def measure(inner: Task, count: int, floor_seconds: float, context: Context) -> Iterator[Record]:
    torch.set_num_threads(count)
    try:
        floor = measure_floor(context.device, floor_seconds)
        yield from inner.run(replace(context, floor=floor, threads=count))
    finally:
        torch.set_num_threads(context.threads)


BENCH = Bench(NAME, "Forward + backward of the adapter path over the number of threads", tasks)
