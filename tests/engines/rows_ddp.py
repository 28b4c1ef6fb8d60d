# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from core import Outcome, adapted, batches, difference, reference, sgd, train, trainable
from torch.nn.parallel import DistributedDataParallel

PROCESSES = 2


def run(tuner: str, *, hybrid: bool = False, **options: Any) -> Outcome:
    expected = reference(tuner, hybrid=hybrid)
    model = DistributedDataParallel(adapted(tuner, hybrid=hybrid).train(), **options)
    return Outcome(difference(train(model, sgd(trainable(model)), batches(dist.get_rank())), expected))


ROWS = {
    "plain": run,
    "hybrid": partial(run, hybrid=True),
    "static graph": partial(run, static_graph=True),
    "find unused parameters": partial(run, find_unused_parameters=True),
}
