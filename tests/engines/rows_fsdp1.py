# SPDX-License-Identifier: Apache-2.0
"""FullyShardedDataParallel (FSDP1) with PEFT's own wrapping policy: an adapter's linear layers are units of their own."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from core import Outcome, adapted, batches, difference, plain_name, reference, sgd, train, trainable
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

PROCESSES = 2


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        # Zeros for a frozen parameter that lies in one flat parameter with trainable ones
        return {plain_name(n): p.grad.float().clone() for n, p in model.named_parameters() if p.requires_grad}


def run(tuner: str, *, hybrid: bool = False, bf16: bool = False, checkpointing: bool = False) -> Outcome:
    # A unit has one dtype: with bfloat16, that of the base model and of the adapters.
    fields = {"hybrid": hybrid, "dtype": torch.bfloat16 if bf16 else torch.float32, "autocast_adapter_dtype": False}
    expected = reference(tuner, **fields)
    peft_model = adapted(tuner, **fields).train()
    model = FullyShardedDataParallel(
        peft_model,
        auto_wrap_policy=fsdp_auto_wrap_policy(peft_model),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    if checkpointing:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    result = train(model, sgd(trainable(model)), batches(dist.get_rank()), gather=full_gradients)
    return Outcome(difference(result, expected))


ROWS = {
    "plain": run,
    "hybrid": partial(run, hybrid=True),
    "bf16": partial(run, bf16=True),
    "hybrid bf16": partial(run, hybrid=True, bf16=True),
    "checkpointing": partial(run, checkpointing=True),
    "hybrid checkpointing": partial(run, hybrid=True, checkpointing=True),
}
