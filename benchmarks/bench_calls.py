"""What a call costs beside its arithmetic: a tiny adapter path, forward, and with backward.

Twice: again and again, and after a training step of a large layer (PEFT's), which leaves nothing of the interpreter's, torch's and our
own data and code in the caches. So it is in a model, where products lie between the calls. ``autograd`` is ``torch.neg`` and its gradient:
what torch itself takes for the least that can be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from .bench import Bench, Context, Task
from .data import Data
from .grid import SQUARE
from .layer_path import forward, train
from .levels import Level
from .peers import paths
from .results import Record
from .shapes import Shape
from .timing import Contender

NAME = "calls"
TINY = Shape(16, 16, T=1, r=4)
SHARE = 0.5  # of a case's time: calls are short, so there are many rounds all the same
BETWEEN = {"tiny": Shape(24, 36, T=3, r=4)}  # else SQUARE


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    if device.type != "cpu":
        return []
    between = BETWEEN.get(level.name, SQUARE)
    return [
        Task(f"{NAME}: {what}, {when}", SHARE * level.seconds + 0.2, partial(measure, what, when, between))
        for what in ("forward", "training")
        for when in ("warm", "after a large layer")
    ]


def measure(what: str, when: str, between: Shape, context: Context) -> Iterator[Record]:
    data, large = Data(TINY, context.device), Data(between, context.device)
    training = what == "training"
    calls: dict[Any, Callable[[], None]] = {
        name: partial(train if training else forward, path, data) for name, path in paths(data).items()
    }
    calls["autograd"] = partial(_least, data.x, training)
    large_step = torch.enable_grad()(partial(train, paths(large)["peft"], large))
    prepare = None if when == "warm" else large_step
    shorter = replace(context, level=replace(context.level, seconds=SHARE * context.level.seconds))
    with torch.set_grad_enabled(training):
        samples = shorter.interleave({name: Contender(call, prepare) for name, call in calls.items()})
    yield Record(NAME, f"{what}, {when}", "s", samples, {**asdict(TINY), "what": what, "when": when})


def _least(x: torch.Tensor, training: bool) -> None:
    y = torch.neg(x)
    if training:
        torch.autograd.grad(y, (x,), y)


BENCH = Bench(NAME, "What a call costs, in caches and out of them", tasks)
