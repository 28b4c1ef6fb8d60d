"""One token through a whole layer, as in generation: what each adapter adds to the time of its base layer.

The overhead of a contender is its time minus that of the base layer, round by round; at T = 1 it is mostly fixed cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch

from . import grid, peers
from .bench import Bench, Context, Task
from .data import Data
from .levels import Level
from .results import Record, overhead
from .shapes import Shape, forward_work
from .timing import Contender

NAME = "inference"
WIDTHS = {
    "tiny": ((24, 36),),
    "quick": ((576, 576), (2048, 2048)),
    "default": grid.WIDTHS[:5],
    "full": grid.WIDTHS,
}


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    rank = 4 if level.name == "tiny" else 16
    shapes = [Shape(n, m, T=1, r=rank) for n, m in WIDTHS[level.name]]
    if level.name in ("default", "full"):
        shapes.append(Shape(2048, 2048, T=1, r=rank // 2, h=rank // 2))
    return [Task(f"{NAME}: {shape.key}", level.seconds + 0.5, partial(measure, shape)) for shape in shapes]


def measure(shape: Shape, context: Context) -> Iterator[Record]:
    data = Data(shape, context.device)
    weight = data.normal(shape.M, shape.N, dtype=shape.x_dtype, scale=shape.N**-0.5)
    layers = {
        "base": peers.linear(weight),
        "ours": peers.our_layer(data, peers.linear(weight)),
        "peft": peers.peft_layer(data, peers.linear(weight)),
        "lora": peers.lora_layer(data, peers.linear(weight), peers.lora_factors(data)),
    }
    with torch.no_grad():
        samples = context.interleave({name: Contender(partial(layer.eval(), data.x)) for name, layer in layers.items()})
    case = asdict(shape)
    yield Record(NAME, f"layer {shape.key}", "s", samples, {**case, "what": "layer"})
    work = forward_work(shape)
    yield overhead(NAME, shape.key, samples, case, work, context.floor.least_seconds(work))


BENCH = Bench(NAME, "One token through a layer, and the overhead over the base layer", tasks)
