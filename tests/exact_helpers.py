# SPDX-License-Identifier: Apache-2.0
"""Models whose merges are to be taken off bit for bit, and what shows that they were."""

from __future__ import annotations

from typing import Any

import torch
from helpers import same_bits
from torch import Tensor, nn
from tuner_helpers import DEVICE, Conv1DMlp, adapted, config

from gralora_ext.tuner import GraloraLinear


class Wide(nn.Module):
    """A layer of 256 by 512, which has room for exceptions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def with_two(base: Any, dtype: torch.dtype, **fields: Any) -> Any:
    model = adapted("fused", base, dtype, **fields)
    targets = {"target_modules": ["first"]} if base is Wide else {}
    other = config(r=8, gralora_k=4, hybrid_r=2, fan_in_fan_out=base is Conv1DMlp, **targets)
    model.add_adapter("other", other)
    return model.to(DEVICE)


def wide(dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Any:
    """A layer whose merges are kept as codes."""
    return with_two(Wide, dtype, target_modules=["first"], **fields)


def layer_of(model: Any) -> Any:
    return model.base_model.model.first


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of all base weights."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}


def assert_as_before(model: Any, before: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in before:
            assert same_bits(parameter.detach(), before[name]), name
    for module in model.modules():
        if isinstance(module, GraloraLinear):
            assert not module.merged and module.kept_merge is None and module.journal is None


def change_adapters(model: Any, seed: int = 0) -> None:
    """What training does to them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gralora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
