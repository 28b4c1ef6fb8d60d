# SPDX-License-Identifier: Apache-2.0
"""Models with two adapters, and what they are by definition, for the tests of several adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tuner_helpers import DEVICE, Conv1DMlp, Mlp, assert_same_output, rows

from gralora_ext import GraloraConfig

NAMES = ("one", "two")
SMALL = {"r": 6, "alpha": 5, "gralora_k": 2, "hybrid_r": 3}
WEIGHTS = [0.7, -1.3]


class WithHead(Mlp):
    """A third linear layer behind, 12 → 3, that is not adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


def config(**fields: Any) -> GraloraConfig:
    """Our configuration, whose adapters start at random, so that they change the output at once."""
    defaults = {"r": 12, "alpha": 24, "gralora_k": 2, "target_modules": ["first", "second"], "init_weights": False}
    return GraloraConfig(**{**defaults, **fields})


def two(a: Any = None, b: Any = None, base: Any = Mlp, dtype: torch.dtype = torch.float64) -> PeftModel:
    """A model with the adapters "one" and "two"; by default of other ranks, scalings and hybrid parts."""
    torch.manual_seed(0)
    base_model = base().to(dtype)
    fan = {"fan_in_fan_out": True} if base is Conv1DMlp else {}
    model = get_peft_model(base_model, config(**{**fan, **(a or {})}), "one", autocast_adapter_dtype=False)
    model.add_adapter("two", config(**{**fan, **(SMALL if b is None else b)}), autocast_adapter_dtype=False)
    return model.to(DEVICE)


def layers(model: PeftModel) -> dict[str, Any]:
    """The two adapted layers."""
    return {name: getattr(model.base_model.model, name) for name in ("first", "second")}


def delta(layer: Any, adapter: str) -> Tensor:
    """ΔW as [M, N], from its definition, in float64; zero where the layer does not have the adapter."""
    if adapter not in layer.gralora_A:
        return torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64, device=DEVICE)
    A, B = layer.gralora_A[adapter].detach().double(), layer.gralora_B[adapter].detach().double()
    k, rb = A.shape[0], A.shape[2] // A.shape[0]
    blocks = [[(A[n, :, j * rb : (j + 1) * rb] @ B[j, n * rb : (n + 1) * rb]).T for n in range(k)] for j in range(k)]
    dense = torch.cat([torch.cat(row, dim=1) for row in blocks])
    if layer.hybrid_r[adapter]:
        dense = dense + (
            layer.gralora_B_general[adapter].weight.double() @ layer.gralora_A_general[adapter].weight.double()
        )
    return dense.detach() * layer.scaling[adapter]


def summed(layer: Any, adapters: Any = NAMES, weights: Any = WEIGHTS) -> Tensor:
    """The weighted sum of ΔW."""
    return sum(w * delta(layer, a) for a, w in zip(adapters, weights, strict=True))


def assert_loads_the_same(model: PeftModel, name: str, folder: Path, base: Any = Mlp) -> PeftModel:
    """What the model computes with ``name`` is what the tuner in use makes of its checkpoint."""
    model.set_adapter(name)
    model.save_pretrained(folder, selected_adapters=[name])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(base().double().to(DEVICE), folder / name)
    assert_same_output(again(rows(5)), model(rows(5)))
    return again
