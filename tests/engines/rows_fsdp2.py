# SPDX-License-Identifier: Apache-2.0
"""fully_shard (FSDP2): the units are linear layers, or layers with their adapters, or decoder layers."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from core import (
    Outcome,
    adapted,
    batches,
    checkpoint_activations,
    difference,
    plain_name,
    reference,
    sgd,
    train,
    trainable,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

PROCESSES = 2


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        plain_name(n): p.grad.full_tensor().float().clone() for n, p in model.named_parameters() if p.grad is not None
    }


def run(tuner: str, *, unit: type, hybrid: bool = False, bf16: bool = False, checkpointing: bool = False) -> Outcome:
    expected = reference(tuner, hybrid=hybrid)
    model = adapted(tuner, hybrid=hybrid).train()
    if checkpointing:
        checkpoint_activations(model)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in reversed(list(model.modules())):  # inner ones first
        if type(module) is unit or unit is BaseTunerLayer and isinstance(module, unit):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    result = train(model, sgd(trainable(model)), batches(dist.get_rank()), gather=full_gradients)
    return Outcome(difference(result, expected))


ROWS = {
    "per adapted layer": partial(run, unit=BaseTunerLayer),
    "per adapted layer hybrid": partial(run, unit=BaseTunerLayer, hybrid=True),
    "per Linear": partial(run, unit=nn.Linear),
    "per Linear hybrid": partial(run, unit=nn.Linear, hybrid=True),
    "per Linear hybrid checkpointing": partial(run, unit=nn.Linear, hybrid=True, checkpointing=True),
    "per Linear bf16": partial(run, unit=nn.Linear, bf16=True),
    "per decoder layer": partial(run, unit=LlamaDecoderLayer),
    "per decoder layer hybrid": partial(run, unit=LlamaDecoderLayer, hybrid=True),
    "per decoder layer hybrid checkpointing": partial(run, unit=LlamaDecoderLayer, hybrid=True, checkpointing=True),
    "per decoder layer bf16": partial(run, unit=LlamaDecoderLayer, bf16=True),
}
