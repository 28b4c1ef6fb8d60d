"""Forward of the adapter path alone: the base layer's output is given, and the path is added to it."""

from functools import partial

from .bench import Bench
from .layer_path import grid_tasks

BENCH = Bench("forward", "Forward of the adapter path", partial(grid_tasks, "forward", False))
