# SPDX-License-Identifier: Apache-2.0
"""Quantized base models.

Training gives what PEFT's layer gives on the same base, or on the same weights where it cannot be built; after a merge, unmerging gives
the model of before.
"""

from __future__ import annotations

from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from core import Outcome, adapt, base_model, batches, difference, relative, sgd, train, trainable
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


def reference_base(kind: str, tuner: str) -> nn.Module:
    """The quantized model; with plain layers of the same weights where it has some on which PEFT's GraLoRA cannot be built."""
    model = quantized(kind)
    if tuner == "lora" or kind in CONFIGS:
        return model
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "W_q"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data = layer.dequantize().detach()
            model.set_submodule(name, plain)
    return model


def training(tuner: str, *, kind: str, hybrid: bool = False) -> Outcome:
    other = "lora" if tuner == "lora" else "peft"
    runs = []
    for each, base in ((tuner, quantized(kind)), (other, reference_base(kind, tuner))):
        model = adapt(base, each, hybrid=hybrid, target_modules=_TARGETS).train()
        runs.append(train(model, sgd(trainable(model)), batches()))
    return Outcome(difference(*runs))


def merge(tuner: str, *, kind: str) -> Outcome:
    """How far the logits after merging and unmerging are from those before; the note tells of those in between."""
    (ids, *_) = batches()
    model: Any = adapt(quantized(kind), tuner, target_modules=_TARGETS).eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
        model.unmerge_adapter()
        after = model(input_ids=ids).logits
    return Outcome(relative(after, before), note=f"merged: {relative(merged, before):.1e}")


ROWS = {
    **{f"{kind}, training": partial(training, kind=kind) for kind in KINDS},
    **{f"{kind}, training, hybrid": partial(training, kind=kind, hybrid=True) for kind in KINDS},
    **{f"{kind}, merge and unmerge": partial(merge, kind=kind) for kind in KINDS},
}
