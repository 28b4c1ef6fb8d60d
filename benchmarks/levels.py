"""How much is measured: ``--quick``, the default, ``--full``, and ``tiny`` for the tests of the suite itself."""

from __future__ import annotations

from dataclasses import dataclass


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
