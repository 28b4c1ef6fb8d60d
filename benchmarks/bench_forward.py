"""Forward of the adapter path alone: the base layer's output is given, and the path is added to it."""

from __future__ import annotations

import torch

from . import grid, layer_path
from .bench import Bench, Task
from .levels import Level


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    compiled = grid.compiled_shapes(level)
    return [
        layer_path.task("forward", shape, level, training=False, compile_peft=shape in compiled)
        for shape in grid.shapes(level)
    ]


BENCH = Bench("forward", "Forward of the adapter path", tasks)
