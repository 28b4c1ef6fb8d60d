"""What the benches have in common: a list of tasks, each with its expected time, and what a task may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .floor import Floor
from .levels import Level
from .results import Record
from .timing import Contender, Samples, interleave


@dataclass
class Context:
    """What a task measures with, and the reasons for what it had to leave out."""

    device: torch.device
    level: Level
    floor: Floor
    threads: int
    skipped: dict[str, str] = field(default_factory=dict)

    def interleave(self, contenders: dict[Any, Contender], rounds: int | None = None) -> Samples:
        return interleave(contenders, self.level.seconds, rounds or self.level.rounds, self.device)


@dataclass(frozen=True)
class Task:
    """``run`` measures one case.

    ``seconds`` and ``memory`` (bytes) are what that is expected to take: for the estimate and the progress bar, and to
    leave out what the machine cannot hold.
    """

    key: str
    seconds: float
    run: Callable[[Context], Iterator[Record]]
    memory: int = 0


@dataclass(frozen=True)
class Bench:
    """A bench: ``tasks(level, threads, device)`` lists its cases."""

    name: str
    title: str
    tasks: Callable[[Level, int, torch.device], list[Task]]
