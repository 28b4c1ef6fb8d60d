# SPDX-License-Identifier: Apache-2.0
"""An adapter that fits some layers of a model alone is added to none, and what was there stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_helpers import config
from helpers import same_bits
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from tuner_helpers import DEVICE, Mlp, adapted, needs_new_peft, rows

from gralora_ext.tuner import enable, layer


class Odd(Mlp):
    """Whose second layer is 36 → 12 and whose head is 12 → 7."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(super().forward(x))


class WithList(Mlp):
    """Whose list of modules cannot be saved with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](super().forward(x))


ALL = ["first", "second", "head"]
# Each fits `first`, and fails at a layer after it.
MISFITS: dict[str, dict[str, Any]] = {
    "width": {"target_modules": ALL},
    "pattern": {"target_modules": ["first", "second"], "rank_pattern": {"second": 3}},
    "start": {
        "target_modules": ["first", "second"],
        "r": 6,
        "rank_pattern": {"first": 8},
        "init_weights": "orthogonal",
    },
}
ERRORS = (ValueError, TypeError)
NEEDS_PATTERNS = ("pattern", "start")


def state(model: nn.Module) -> dict[str, Any]:
    """What a failure must leave alone: modules, parameters and what is trained."""
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    adapters = {
        name: {key: dict(value) for key, value in vars(module).items() if type(value) is dict and key[0] != "_"}
        for name, module in model.named_modules()
        if hasattr(module, "scaling")
    }
    active = {name: list(m.active_adapters) for name, m in model.named_modules() if hasattr(m, "active_adapters")}
    return {"modules": modules, "parameters": parameters, "adapters": adapters, "active": active}


@pytest.mark.parametrize("why", [pytest.param(w, marks=needs_new_peft if w in NEEDS_PATTERNS else ()) for w in MISFITS])
def test_a_model_that_an_adapter_does_not_fit_is_as_before(why: str) -> None:
    model = Odd().to(DEVICE)
    before = state(model)
    with enable():
        with pytest.raises(ERRORS):
            get_peft_model(model, config(**MISFITS[why]))
        assert state(model) == before
        retried = get_peft_model(model, config(target_modules=["second"]))
    trained = {name for name, p in retried.named_parameters() if p.requires_grad}
    assert trained and all(".second.gralora_" in name for name in trained)


@pytest.mark.parametrize("why", [pytest.param(w, marks=needs_new_peft if w in NEEDS_PATTERNS else ()) for w in MISFITS])
def test_the_adapters_that_were_there_are_as_before(why: str, tmp_path: Path) -> None:
    model = adapted("fused", Odd, torch.float32, target_modules=["first"], modules_to_save=["head"]).eval()
    x, before = rows(3, dtype=torch.float32), state(model)
    expected, fields = model(x), {**MISFITS[why], "modules_to_save": ["second"] if why == "width" else None}
    with enable(), pytest.raises(ERRORS):
        model.add_adapter("other", config(**fields))
    assert state(model) == before and list(model.peft_config) == ["default"]
    assert same_bits(model(x), expected)
    model.save_pretrained(tmp_path)
    assert not any("other" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    with enable():
        model.add_adapter("other", config(target_modules=["first", "second"]))
    model.set_adapter("other")
    assert not same_bits(model(x), expected)


def test_ctrl_c_in_the_middle_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, finish, calls = adapted("fused", Odd, target_modules=["first"]), layer.init.finish, []
    before = state(model)

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        finish(*args)

    monkeypatch.setattr(layer.init, "finish", interrupted)
    with enable(), pytest.raises(KeyboardInterrupt):
        model.add_adapter("other", config(target_modules=["first", "second"]))
    assert state(model) == before


def test_an_addition_that_fails_after_the_model_was_unmerged_spoils_no_weight() -> None:
    """PEFT wraps the modules to save after it has activated the adapter, for which it unmerges."""
    model = adapted("fused", WithList, torch.float32, target_modules=["first"]).eval()
    x = rows(3, dtype=torch.float32)
    expected, weight = model(x), model.base_model.model.first.base_layer.weight
    before = weight.clone()
    model.merge_adapter()
    with enable(), pytest.warns(UserWarning, match="Unmerging the model first"), pytest.raises(TypeError):
        model.add_adapter("other", config(target_modules=["first"], modules_to_save=["blocks"]))
    assert same_bits(weight, before) and same_bits(model(x), expected)
