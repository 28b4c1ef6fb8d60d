# SPDX-License-Identifier: Apache-2.0
"""Accelerate's offloading: parameters lie in other memory or on disk, and come where a module's forward is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from core import Outcome, adapted, batches, difference, reference, relative, sgd, train, trainable
from torch import nn

Offload = Callable[[nn.Module, str], Any]


def inference(tuner: str, *, offload: Offload, hybrid: bool = False) -> Outcome:
    (ids, *_) = batches()
    with torch.no_grad(), TemporaryDirectory() as folder:
        expected = adapted("lora" if tuner == "lora" else "peft", hybrid=hybrid).eval()(input_ids=ids).logits
        model = adapted(tuner, hybrid=hybrid).eval()
        offload(model, folder)
        actual = model(input_ids=ids).logits
    return Outcome(relative(actual, expected))


def to_memory(model: nn.Module, folder: str) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model: nn.Module, folder: str) -> None:
    disk_offload(model, folder, execution_device=torch.device("cpu"))


def by_device_map(model: nn.Module, folder: str) -> None:
    """One decoder layer stays where it is, the other one's parameters lie on disk."""
    layers = "base_model.model.model.layers"
    others = ("embed_tokens", "norm", "rotary_emb")
    device_map = {f"{layers}.0": "cpu", f"{layers}.1": "disk", "base_model.model.lm_head": "cpu"}
    device_map.update({f"base_model.model.model.{name}": "cpu" for name in others})
    dispatch_model(model, device_map, main_device="cpu", offload_dir=Path(folder))


def prepared(tuner: str) -> Outcome:
    """Trained by Accelerator.prepare and Accelerator.backward's means."""
    model = adapted(tuner).train()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, sgd(trainable(model)))
    return Outcome(difference(train(model, optimizer, batches()), reference(tuner)))


ROWS = {
    "Accelerator": prepared,
    "cpu_offload": partial(inference, offload=to_memory),
    "cpu_offload, hybrid": partial(inference, offload=to_memory, hybrid=True),
    "disk_offload": partial(inference, offload=to_disk),
    "device_map": partial(inference, offload=by_device_map),
    "device_map, hybrid": partial(inference, offload=by_device_map, hybrid=True),
}
