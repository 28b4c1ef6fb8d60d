# SPDX-License-Identifier: Apache-2.0
"""The parts of a plan: tensors of the result, what is added to each, and the files that they go into."""

from __future__ import annotations

from dataclasses import dataclass

from .adapter import Layer
from .base import Source
from .header import nbytes_of


@dataclass
class Addition:
    """One layer of one adapter, to be added to a weight."""

    layer: Layer
    scaling: float
    fan_in_fan_out: bool


@dataclass(slots=True)  # a model may have 100,000 tensors
class Job:
    """One tensor of the result."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source
    computed: str  # the dtype in which it is added to: that of the base, or a wider one
    additions: tuple[Addition, ...] = ()

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)

    @property
    def is_copy(self) -> bool:
        return not self.additions and self.source.info.dtype == self.dtype


@dataclass
class Shard:
    """One file of weights of the result."""

    name: str
    jobs: list[Job]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)
