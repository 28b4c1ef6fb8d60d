# SPDX-License-Identifier: Apache-2.0
"""What the benches have in common: levels, tasks with their expected time, and what a task may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .machine import Floor
from .results import Record
from .timing import Contender, Samples, interleave


class Skip(Exception):
    """The reason, in one sentence; the run goes on without the case."""


@dataclass(frozen=True)
class Level:
    """The time that one case may take for its samples, and the least number of rounds whatever it takes."""

    name: str
    seconds: float
    rounds: int


LEVELS = {
    "tiny": Level("tiny", 0.01, 2),
    "quick": Level("quick", 1.0, 5),
    "default": Level("default", 1.8, 7),
    "full": Level("full", 5.0, 9),
}


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

    ``seconds`` and ``memory`` (bytes) are what that is expected to take: for the estimate and the
    progress bar, and to leave out what the machine cannot hold.
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
