# SPDX-License-Identifier: Apache-2.0
"""torch.autocast in bfloat16, and models in bfloat16, with errors against a run in float32."""

from __future__ import annotations

from functools import partial

import torch
from core import Outcome, adapted, batches, difference, reference, sgd, train, trainable


def autocast(tuner: str, *, hybrid: bool = False) -> Outcome:
    model = adapted(tuner, hybrid=hybrid).train()
    run = train(model, sgd(trainable(model)), batches(), around=lambda: torch.autocast("cpu", torch.bfloat16))
    return Outcome(difference(run, reference(tuner, hybrid=hybrid)))


def bf16_model(tuner: str, *, adapters_in_float32: bool, hybrid: bool = False) -> Outcome:
    fields = {"hybrid": hybrid, "dtype": torch.bfloat16, "autocast_adapter_dtype": adapters_in_float32}
    model = adapted(tuner, **fields).train()
    return Outcome(difference(train(model, sgd(trainable(model)), batches()), reference(tuner, **fields)))


ROWS = {
    "bf16 autocast": autocast,
    "bf16 autocast, hybrid": partial(autocast, hybrid=True),
    "bf16 model, float32 adapters": partial(bf16_model, adapters_in_float32=True),
    "bf16 model, float32 adapters, hybrid": partial(bf16_model, adapters_in_float32=True, hybrid=True),
    "bf16 model and adapters": partial(bf16_model, adapters_in_float32=False),
}
