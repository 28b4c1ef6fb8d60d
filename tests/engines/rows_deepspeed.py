# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ZeRO on the CPU, stages 1 to 3."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch.distributed as dist
from core import (
    SEQUENCES,
    Outcome,
    Run,
    adapted,
    batches,
    checkpoint_activations,
    difference,
    mean_over_processes,
    plain_name,
    reference,
    sgd,
    trainable,
)
from deepspeed.utils import safe_get_full_grad

PROCESSES = 2


def run(tuner: str, *, stage: int, hybrid: bool = False, bf16: bool = False, checkpointing: bool = False) -> Outcome:
    expected = reference(tuner, hybrid=hybrid)
    model = adapted(tuner, hybrid=hybrid).train()
    if checkpointing:
        checkpoint_activations(model)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if bf16:
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(trainable(model)), config=config)
    losses, kept = [], {}
    for ids in batches(dist.get_rank()):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        losses.append(mean_over_processes(loss))
        kept = {
            plain_name(name): safe_get_full_grad(p).float().clone()
            for name, p in engine.named_parameters()
            if p.requires_grad
        }
        engine.step()
    return Outcome(difference(Run(losses, kept), expected))


_VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "hybrid": {"hybrid": True},
    "checkpointing": {"checkpointing": True},
    "bf16": {"bf16": True},
    "hybrid bf16 checkpointing": {"hybrid": True, "bf16": True, "checkpointing": True},
}
ROWS = {
    f"ZeRO-{stage} {name}": partial(run, stage=stage, **variant)
    for stage in (1, 2, 3)
    for name, variant in _VARIANTS.items()
}
