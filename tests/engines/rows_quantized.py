# SPDX-License-Identifier: Apache-2.0
"""Quantized base models.

Training gives what PEFT's layer gives on the same base; a merge is right, or refused with nothing written.
"""

from __future__ import annotations

from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from core import Outcome, adapt, base_model, batches, difference, refused, relative, sgd, train, trainable
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig


def torchao_config() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


CONFIGS = {
    "bitsandbytes 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4 bit": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "torchao int8": torchao_config,
}
KINDS = (*CONFIGS, "HQQ 4 bit")
_TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
_BLOCK = 64  # by which widths must divide


def hqq_model() -> nn.Module:
    """Made by the library itself: transformers has left it out in some releases."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, config = base_model(intermediate_size=2 * _BLOCK), BaseQuantizeConfig(nbits=4, group_size=_BLOCK)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))
    return model


def quantized(kind: str) -> nn.Module:
    if kind not in CONFIGS:
        return hqq_model()
    with TemporaryDirectory() as folder:
        base_model(intermediate_size=2 * _BLOCK).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=CONFIGS[kind](), device_map="cpu", dtype=torch.float32
        )


def training(tuner: str, *, kind: str, hybrid: bool = False) -> Outcome:
    runs = []
    for each in (tuner, "lora" if tuner == "lora" else "peft"):
        model = adapt(quantized(kind), each, hybrid=hybrid, target_modules=_TARGETS).train()
        runs.append(train(model, sgd(trainable(model)), batches()))
    return Outcome(difference(*runs))


def merge(tuner: str, *, kind: str) -> Outcome:
    """How far the logits of the merged model are from those before; after a refusal they must be the same."""
    (ids, *_) = batches()
    model: Any = adapt(quantized(kind), tuner, target_modules=_TARGETS).eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        try:
            model.merge_adapter()
        except (TypeError, ValueError) as error:
            outcome = refused(tuner, error, "merg")
            distance = relative(model(input_ids=ids).logits, before)
            assert distance == 0.0, "the refused merge has changed the model"
            return outcome
        return Outcome(relative(model(input_ids=ids).logits, before))


ROWS = {
    **{f"{kind}, training": partial(training, kind=kind) for kind in KINDS},
    **{f"{kind}, training, hybrid": partial(training, kind=kind, hybrid=True) for kind in KINDS},
    **{f"{kind}, merge": partial(merge, kind=kind) for kind in KINDS},
}
