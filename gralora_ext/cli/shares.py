# SPDX-License-Identifier: Apache-2.0
"""The training rows, shared out: step by step the same rows whatever the number of processes.

One process takes batches of B rows from a permutation of all, another one for each epoch. P
processes take P B rows at a time, B each; at an epoch's end some get fewer, or none. Such a one
goes through a batch without labels, since the others need it in their collective operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader

from .data import IGNORED
from .launcher import Place

Batch = dict[str, torch.Tensor]


class Shares(BatchSampler):
    """One process's batches of row numbers; the permutation is the one that Trainer draws in a job of one process."""

    def __init__(self, rows: list[Any], batch_size: int, seed: int, place: Place):
        self.order = SeedableRandomSampler(rows, data_seed=seed)
        self.batch_size = batch_size
        self.place = place

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.order)
        for start in range(0, len(order), self.batch_size * self.place.size):
            own = start + self.place.rank * self.batch_size
            yield order[own : own + self.batch_size]

    def __len__(self) -> int:
        return math.ceil(len(self.order) / (self.batch_size * self.place.size))


class ShareLoader(DataLoader):
    """Batches of :class:`Shares`; where it has no rows for this process, a batch without labels."""

    def __init__(self, rows: Any, collate: Callable[[list[Any]], Batch], shares: Shares):
        self.set_epoch = shares.set_epoch  # Trainer calls it

        def collate_share(items: list[Any]) -> Batch:
            return collate(items) if items else without_labels(collate(rows[:1]))

        super().__init__(rows, batch_sampler=shares, collate_fn=collate_share)


def without_labels(batch: Batch) -> Batch:
    return {name: torch.full_like(t, IGNORED) if name.endswith("labels") else t for name, t in batch.items()}


def has_labels(batch: Batch) -> bool:
    return bool((batch["labels"] != IGNORED).any())
