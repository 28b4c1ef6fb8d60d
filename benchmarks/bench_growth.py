"""How the time of forward + backward grows as T, N = M, r or k doubles, all else as it is."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import layer_path
from .bench import Bench, Task
from .grid import SQUARE
from .levels import Level
from .shapes import Shape

NAME = "growth"
AXES = {
    "T": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "N": (512, 1024, 2048, 4096, 8192),
    "r": (8, 16, 32, 64, 128),
    "k": (1, 2, 4, 8, 16),
}
STRIDES = {"quick": 2, "default": 1, "full": 1}  # quick takes every second point


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    if level.name == "tiny":
        points = [("T", 2, Shape(24, 36, T=2, r=4)), ("T", 4, Shape(24, 36, T=4, r=4))]
    else:
        stride = STRIDES[level.name]
        points = [(axis, value, point(axis, value)) for axis, values in AXES.items() for value in values[::stride]]
    return [
        layer_path.task(NAME, shape, level, training=True, label=f"{axis}: ", axis=axis, value=value)
        for axis, value, shape in points
    ]


def point(axis: str, value: int) -> Shape:
    return replace(SQUARE, N=value, M=value) if axis == "N" else replace(SQUARE, **{axis: value})


BENCH = Bench(NAME, "Growth of forward + backward over T, N = M, r and k", tasks)
