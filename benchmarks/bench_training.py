"""Forward and backward (dx, dA, dB and those of the hybrid part) of the adapter path alone."""

from functools import partial

from .bench import Bench
from .layer_path import grid_tasks

BENCH = Bench("training", "Forward + backward of the adapter path", partial(grid_tasks, "training", True))
