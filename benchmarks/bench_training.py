"""Forward and backward (dx, dA, dB and those of the hybrid part) of the adapter path alone."""

from __future__ import annotations

import torch

from . import grid, layer_path
from .bench import Bench, Task
from .levels import Level


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    compiled = grid.compiled_shapes(level)
    return [
        layer_path.task("training", shape, level, training=True, compile_peft=shape in compiled)
        for shape in grid.shapes(level)
    ]


BENCH = Bench("training", "Forward + backward of the adapter path", tasks)
