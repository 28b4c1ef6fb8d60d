# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one model: added, switched, combined, disabled and deleted as in PEFT."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import nn
from tuner_helpers import (
    DEVICE,
    Mlp,
    adapted,
    assert_same_gradients,
    assert_same_output,
    config,
    fused_layers,
    pair,
    rows,
    stock_layers,
)

SECOND = {"r": 6, "gralora_k": 3, "hybrid_r": 2, "alpha": 5}

Step = tuple[str, Callable[[PeftModel], object]]
LIFE: list[Step] = [
    ("add a second", lambda m: m.add_adapter("other", config(**SECOND))),
    ("switch to it", lambda m: m.set_adapter("other")),
    ("both", lambda m: m.base_model.set_adapter(["default", "other"])),
    ("merge one", lambda m: m.merge_adapter(adapter_names=["other"])),
    ("unmerge", lambda m: m.unmerge_adapter()),
    ("merge both", lambda m: m.merge_adapter(safe_merge=True)),
    ("unmerge both", lambda m: m.unmerge_adapter()),
    ("disable", lambda m: m.base_model.disable_adapter_layers()),
    ("enable", lambda m: m.base_model.enable_adapter_layers()),
    ("a third, on one layer", lambda m: m.add_adapter("third", config(target_modules=["second"], r=4))),
    ("delete the second", lambda m: m.delete_adapter("other")),
    ("switch to the third", lambda m: m.set_adapter("third")),
    ("delete the active one", lambda m: m.delete_adapter("third")),
    ("second again, another size", lambda m: m.add_adapter("other", config(r=8, gralora_k=4))),
    ("switch to it again", lambda m: m.set_adapter("other")),
]


@pytest.mark.filterwarnings("ignore:Adapter third was active which is now deleted")
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_life_of_adapters_is_pefts_step_by_step() -> None:
    models = pair(gralora_dropout=0.0)
    x = rows(7)
    seen = []
    for name, step in LIFE:
        for model in models:
            torch.manual_seed(3)  # a step may draw the parameters of a new adapter
            step(model)
            model.zero_grad(set_to_none=True)
        stock, fused = models
        assert [(n, p.requires_grad) for n, p in fused.named_parameters()] == [
            (n, p.requires_grad) for n, p in stock.named_parameters()
        ], name
        outputs = [model(x) for model in models]
        assert_same_output(outputs[1], outputs[0])
        assert fused.active_adapters == stock.active_adapters, name
        assert fused_layers(fused) == stock_layers(stock), name
        if outputs[0].requires_grad:
            for y in outputs:
                y.square().sum().backward()
            assert_same_gradients(fused, stock)
        seen.append(outputs[1])
    changed = [not torch.allclose(a, b) for a, b in itertools.pairwise(seen)]
    assert sum(changed) >= 6, "the steps have to change the output, or agreement would mean nothing"


def test_two_active_adapters_add_up() -> None:
    model = adapted("fused")
    model.add_adapter("other", config(**SECOND))
    layer, x = model.base_model.model.first, rows(4)
    base = layer.base_layer(x)
    parts = []
    for active in (["default"], ["other"], ["default", "other"], []):
        layer.set_adapter(active)
        parts.append(layer(x) - base)
    assert_same_output(parts[2], parts[0] + parts[1])
    assert torch.equal(parts[3], torch.zeros_like(base))
    assert (parts[0] - parts[1]).abs().min() > 0


def test_each_adapter_has_its_own_dropout() -> None:
    model = adapted("fused", gralora_dropout=0.5)
    model.add_adapter("other", config(**SECOND))
    layer, x = model.base_model.model.first.train(), rows(4)
    layer.set_adapter(["other"])
    assert torch.equal(layer(x), layer(x))
    layer.set_adapter(["default"])
    assert not torch.equal(layer(x), layer(x))


def test_disable_adapter_gives_the_base_and_comes_back() -> None:
    torch.manual_seed(0)
    base = Mlp().to(DEVICE, torch.float64)
    model, x = adapted("fused"), rows(4)
    y = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), y) and not torch.equal(y, base(x))


def test_base_layer_is_called_whatever_it_is() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor, gain: float = 2.0) -> torch.Tensor:
            return gain * super().forward(x)

    layer, x = adapted("fused").base_model.model.first, rows(4)
    update = layer(x) - layer.base_layer(x)
    doubling = Doubling(24, 36).to(DEVICE, torch.float64)
    doubling.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = doubling
    assert_same_output(layer(x), doubling(x) + update)
    assert_same_output(layer(x, gain=5.0), doubling(x, gain=5.0) + update)
