# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: reentrant and not, and selective, which keeps what matrix products give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from core import Outcome, adapted, batches, checkpoint_activations, difference, reference, sgd, train, trainable
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_AT = torch.ops.aten
_PRODUCTS = [_AT.mm.default, _AT.addmm.default, _AT.bmm.default]
_ADDITIONS = [_AT.add.Tensor, _AT.add_.Tensor, _AT.mul.Tensor]


def whole(tuner: str, *, use_reentrant: bool, hybrid: bool = False) -> Outcome:
    model = adapted(tuner, hybrid=hybrid).train()
    checkpoint_activations(model, use_reentrant)
    return Outcome(difference(train(model, sgd(trainable(model)), batches()), reference(tuner, hybrid=hybrid)))


def selective(tuner: str, *, saved: list[Any], hybrid: bool = False) -> Outcome:
    model = adapted(tuner, hybrid=hybrid).train()
    for layer in model.get_base_model().model.layers:
        layer.forward = _checkpointed(layer, saved)
    return Outcome(difference(train(model, sgd(trainable(model)), batches()), reference(tuner, hybrid=hybrid)))


def _checkpointed(layer: nn.Module, saved: list[Any]) -> Callable[..., Any]:
    contexts = partial(create_selective_checkpoint_contexts, saved)
    return partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)


ROWS = {
    "not reentrant": partial(whole, use_reentrant=False),
    "not reentrant hybrid": partial(whole, use_reentrant=False, hybrid=True),
    "reentrant": partial(whole, use_reentrant=True),
    "reentrant hybrid": partial(whole, use_reentrant=True, hybrid=True),
    "selective, products saved": partial(selective, saved=_PRODUCTS),
    "selective, products saved, hybrid": partial(selective, saved=_PRODUCTS, hybrid=True),
    "selective, additions saved": partial(selective, saved=_ADDITIONS),
}
