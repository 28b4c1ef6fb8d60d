# SPDX-License-Identifier: Apache-2.0
"""The floor of a machine, which no kernel can beat: its GEMM peak and its bandwidth, measured."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .shapes import Work
from .timing import Contender, interleave

CACHED_BYTES = 8 << 20
LARGE_BYTES = 256 << 20
GEMM_SIZE = 1536
PACE_GEMM_SIZE = 384  # short enough to take turns with what is measured


@dataclass(frozen=True)
class Bandwidth:
    """Bytes/s, read + written: of a copy into memory that was written before, and of an update in place.

    A copy brings the lines of its destination into the cache only to overwrite them; an update does
    not.
    """

    copy: float
    update: float

    @property
    def best(self) -> float:
        return max(self.copy, self.update)


@dataclass(frozen=True)
class Floor:
    """The fp32 GEMM peak in FLOP/s, and the bandwidths of memory in cache and far out of it.

    ``pace_seconds``: the least time of the short GEMM of :func:`pace_contender`.
    """

    gemm: float
    cached: Bandwidth
    large: Bandwidth
    pace_seconds: float

    def bandwidth(self, working_set: int) -> float:
        """The best of the two measured sizes, and on a straight line between them over the logarithm of the size."""
        place = math.log(working_set / CACHED_BYTES) / math.log(LARGE_BYTES / CACHED_BYTES)
        share = min(1.0, max(0.0, place))
        return (1 - share) * self.cached.best + share * self.large.best

    def least_seconds(self, work: Work) -> float:
        """max(FLOPs/peak, bytes/bandwidth)."""
        return max(work.flops / self.gemm, work.bytes / self.bandwidth(work.working_set))

    def pace(self, samples: list[float]) -> float:
        """How fast the machine was while ``samples`` of :func:`pace_contender` were taken; 1 is as fast as in the floor."""
        return self.pace_seconds / statistics.median(samples)

    def as_dict(self) -> dict[str, Any]:
        sizes = {"gemm_size": GEMM_SIZE, "pace_gemm_size": PACE_GEMM_SIZE}
        return {**asdict(self), "cached_bytes": CACHED_BYTES, "large_bytes": LARGE_BYTES, **sizes}


def pace_contender(device: torch.device) -> Contender:
    """A short fp32 GEMM: beside a bench's contenders it tells how much of its arithmetic other users leave the machine."""
    return _gemm(PACE_GEMM_SIZE, device)


def measure_floor(device: torch.device, seconds: float) -> Floor:
    """The best of the samples taken in ``seconds``: a floor is what the machine can do, not what it does on average.

    Copy and update both touch a working set of ``CACHED_BYTES`` or ``LARGE_BYTES`` in all.
    """
    contenders = {("gemm", 0): _gemm(GEMM_SIZE, device)}
    for size in (CACHED_BYTES, LARGE_BYTES):
        memory = torch.ones(2, size // 8, dtype=torch.float32, device=device)
        contenders["copy", size] = _copy(memory)
        contenders["update", size] = _update(memory)
    best = {name: min(values) for name, values in interleave(contenders, 0.8 * seconds, 3, device).items()}

    def bandwidth(size: int) -> Bandwidth:
        """A copy reads one half of the memory and writes the other, an update reads and writes all of it."""
        return Bandwidth(copy=size / best["copy", size], update=2 * size / best["update", size])

    gemm = 2 * GEMM_SIZE**3 / best["gemm", 0]
    # Beside the copies its operands would come from memory each time.
    alone = interleave({"pace": pace_contender(device)}, 0.2 * seconds, 3, device)
    return Floor(gemm, bandwidth(CACHED_BYTES), bandwidth(LARGE_BYTES), min(alone["pace"]))


def _gemm(size: int, device: torch.device) -> Contender:
    a, b, c = (torch.ones(size, size, device=device) for _ in range(3))
    return Contender(lambda: torch.mm(a, b, out=c))


def _copy(memory: Tensor) -> Contender:
    return Contender(lambda: memory[0].copy_(memory[1]))


def _update(memory: Tensor) -> Contender:
    return Contender(lambda: memory.mul_(1.0))
