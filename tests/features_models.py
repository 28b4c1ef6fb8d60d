# SPDX-License-Identifier: Apache-2.0
"""Kinds of models, and what others do with a model that has an adapter."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from feature_tuners import Tuner, delta, feature, layer, near
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from tuner_helpers import Conv1DMlp, llama, rows, tokens


@feature("transformers' Conv1D (GPT-2)")
def _(tuner: Tuner) -> None:
    model = tuner.model(Conv1DMlp, fan_in_fan_out=True)
    x, change = rows(3), delta(model)
    near(layer(model)(x), layer(model).get_base_layer()(x) + x @ change)
    y = model(x)
    model.merge_adapter()
    near(model(x), y)


@feature("a 16-bit model, with the adapter in float32")
def _(tuner: Tuner) -> None:
    torch.manual_seed(0)
    model = tuner.model(llama, target_modules=["q_proj"]).to(torch.float32)
    y = model(input_ids=tokens(2, 6)).logits
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    half = model(input_ids=tokens(2, 6)).logits
    assert half.dtype == torch.bfloat16 and (half - y).norm() < 0.05 * y.norm()


@feature("gradient checkpointing")
def _(tuner: Tuner) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = tuner.model(llama, target_modules=["q_proj", "down_proj"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = tokens(2, 8)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        near(actual, expected)


@feature("`torch.compile`, as one graph")
def _(tuner: Tuner) -> None:
    model = tuner.model()
    y = model(rows(4))
    near(torch.compile(model, backend="aot_eager", fullgraph=True)(rows(4)), y)


@feature("`AutoPeftModelForCausalLM`")
def _(tuner: Tuner) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "base")
        torch.manual_seed(0)
        llama().save_pretrained(path)
        model: Any = tuner.model(llama, target_modules=["q_proj"]).float()
        model.peft_config["default"].base_model_name_or_path = path
        model.save_pretrained(Path(folder) / "adapter")
        again = AutoPeftModelForCausalLM.from_pretrained(Path(folder) / "adapter")
        near(again(input_ids=tokens(2, 6)).logits, model(input_ids=tokens(2, 6)).logits, 1e-5)


@feature("`get_layer_status`")
def _(tuner: Tuner) -> None:
    status = tuner.model().get_layer_status()
    assert [s.name for s in status] == ["model.first", "model.second"] and status[0].requires_grad == {"default": True}


@feature("weights that accelerate offloads, in inference")
def _(tuner: Tuner) -> None:
    model = tuner.model(llama, target_modules=["q_proj"]).eval()
    with torch.no_grad():
        y = model(input_ids=tokens(2, 6)).logits
        cpu_offload(model, torch.device("cpu"))
        near(model(input_ids=tokens(2, 6)).logits, y)
