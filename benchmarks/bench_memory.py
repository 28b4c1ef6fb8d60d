"""Memory of the adapter path in training: bytes saved for backward, and the peak of a forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import torch

from .bench import Bench, Context, Task
from .data import Data
from .errors import Skip
from .grid import SMALL, SQUARE
from .levels import Level
from .memory import saved_bytes
from .memory_child import SECONDS, peaks
from .peers import paths
from .results import Record
from .shapes import Shape

NAME = "memory"
SHAPES = {
    "tiny": [Shape(24, 36, T=3, r=4)],
    "quick": [replace(SQUARE, T=2048)],
    "default": [
        replace(SQUARE, T=2048),
        replace(SQUARE, T=2048, activation="bf16"),
        replace(SQUARE, T=2048, dropout=0.1),
        Shape(4096, 14336, T=2048),
    ],
    "full": [
        *(replace(s, T=2048, activation=a, h=h) for s in (SMALL, SQUARE) for a in ("fp32", "bf16") for h in (0, 16)),
        replace(SQUARE, T=2048, dropout=0.1),
        replace(SQUARE, T=2048, r=128, k=8),
        *(Shape(n, m, T=2048) for n, m in ((4096, 14336), (14336, 4096))),
    ],
}


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    return [Task(f"{NAME}: {shape.key}", SECONDS, partial(measure, shape)) for shape in SHAPES[level.name]]


def measure(shape: Shape, context: Context) -> Iterator[Record]:
    data = Data(shape, context.device)
    saved = {
        name: saved_bytes(partial(path.call, data.x, data.base.detach()), (data.x, *path.parameters))
        for name, path in paths(data).items()
    }
    yield _record("saved", shape, saved)
    try:
        yield _record("peak", shape, peaks("training", shape, context.device, context.threads))
    except Skip as reason:
        context.skipped["peak memory"] = str(reason)


def _record(what: str, shape: Shape, values: dict[str, int]) -> Record:
    samples = {name: [float(value)] for name, value in values.items()}
    return Record(NAME, f"{what} {shape.key}", "bytes", samples, {**asdict(shape), "what": what})


BENCH = Bench(NAME, "Memory of forward + backward of the adapter path", tasks)
