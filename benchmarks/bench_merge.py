"""Merging an adapter into its layer's weight, and unmerging it: time, and the peak of extra memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch

from .bench import Bench, Context, Task
from .data import Data
from .errors import Skip
from .layer_path import CALL_SECONDS
from .levels import Level
from .memory_child import SECONDS, peaks
from .merging import layers, merge_error, merges, unmerges
from .results import Record
from .shapes import Shape, merge_work

NAME = "merge"
WIDTHS = {
    "tiny": ((24, 36),),
    "quick": ((2048, 2048),),
    "default": ((2048, 2048), (4096, 4096), (4096, 14336)),
    "full": ((2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096)),
}


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    # T = 1, since a merge sees no tokens; the adapter stays in float32 beside a 16-bit weight, as PEFT keeps it.
    shapes = [
        Shape(n, m, T=1, r=4 if level.name == "tiny" else 32, activation=dtype)
        for n, m in WIDTHS[level.name]
        for dtype in ("fp32", "bf16")
    ]
    return [
        Task(f"{NAME}: {key(s)}", expected_seconds(s, level), partial(measure, s), memory=6 * 4 * s.N * s.M)
        for s in shapes
    ]


def key(shape: Shape) -> str:
    return f"{shape.N}x{shape.M} r={shape.r} k={shape.k} {shape.activation}"


def expected_seconds(shape: Shape, level: Level) -> float:
    pair = 3 * 2 * 2 * CALL_SECONDS * shape.N * shape.M  # three contenders, there and back, each writing M × N twice
    return SECONDS + 10 * pair + 2 * max(level.seconds, (level.rounds + 2) * pair)


def measure(shape: Shape, context: Context) -> Iterator[Record]:
    data = Data(shape, context.device)
    adapted = layers(data)
    errors = {name: merge_error(layer, data) for name, layer in adapted.items()}
    work = merge_work(shape)
    case = asdict(shape)
    for what, contenders in (("merge", merges(adapted)), ("unmerge", unmerges(adapted))):
        with torch.no_grad():
            samples = context.interleave(contenders)
        yield Record(
            bench=NAME,
            key=f"{what} {key(shape)}",
            unit="s",
            samples=samples,
            case={**case, "what": what},
            errors=errors if what == "merge" else {},
            work=work,
            least=context.floor.least_seconds(work),
        )
    try:
        peak = peaks("merge", shape, context.device, context.threads)
    except Skip as reason:
        context.skipped["peak memory"] = str(reason)
        return
    samples = {name: [float(value)] for name, value in peak.items()}
    yield Record(NAME, f"peak of merge {key(shape)}", "bytes", samples, {**case, "what": "peak"})


BENCH = Bench(NAME, "Merge and unmerge", tasks)
