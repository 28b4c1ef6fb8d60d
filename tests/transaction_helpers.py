# SPDX-License-Identifier: Apache-2.0
"""Models that are merged as a whole, what a merge may change of them, and what breaks it off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import same_bits
from tuner_helpers import DEVICE, Conv1DMlp, Mlp, adapted, config, llama

from gralora_ext.tuner import GraloraLinear

CALLS = {
    "merge": lambda model: model.merge_adapter(),
    "safe merge": lambda model: model.merge_adapter(safe_merge=True),
    "merge and unload": lambda model: model.merge_and_unload(),
    "unmerge": lambda model: model.unmerge_adapter(),
}


each_call = pytest.mark.parametrize("call", CALLS)


exactly = pytest.mark.parametrize("exact", [True, False], ids=["codes", "no codes"])


class Wider(Mlp):
    """Wide enough for codes, at the scale of its adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(48, 96), torch.nn.Linear(96, 48)
        for module in (self.first, self.second):
            torch.nn.init.normal_(module.weight, std=10.0)


class Broken(Exception):
    """What breaks a merge off here."""


def model_of(base: Any = Mlp, dtype: torch.dtype = torch.bfloat16, exact: bool = True, call: str = "merge") -> Any:
    targets = {"target_modules": ["q_proj", "down_proj"]} if base is llama else {}
    model = adapted("fused", base, dtype, hybrid_r=2, **targets)
    model.add_adapter("other", config(r=4, fan_in_fan_out=base is Conv1DMlp, **targets))
    model.base_model.set_adapter(["default", "other"])
    for module in layers(model):
        module.exact_unmerge = exact
    if call == "unmerge":
        model.merge_adapter()
    return model.to(DEVICE)


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GraloraLinear)]


class State:
    """All that a merge may change."""

    def __init__(self, model: Any) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.merged = [list(module.merged_adapters) for module in layers(model)]
        self.kept = [module.kept_merge for module in layers(model)]
        self.tree = [(name, id(module)) for name, module in model.named_modules()]
        self.config = getattr(model.base_model.model, "peft_config", None)

    def assert_same(self, model: Any) -> None:
        now = State(model)
        assert now.tree == self.tree and now.merged == self.merged and now.config is self.config
        assert all(a is b for a, b in zip(now.kept, self.kept, strict=True))
        assert now.weights.keys() == self.weights.keys()
        for name, weight in now.weights.items():
            assert same_bits(weight, self.weights[name]), name
        assert all(module.journal is None for module in layers(model))


@contextmanager
def breaking(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException, after: bool) -> Iterator[None]:
    """The merge or unmerge of the layer ``at`` raises before or after it does its work."""
    count = 0

    def breaks(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == at and not after:
                raise error
            result = work(*args, **kwargs)
            if count - 1 == at:
                raise error
            return result

        return call

    with monkeypatch.context() as patch:
        for name in ("merge", "take_off"):
            patch.setattr(GraloraLinear, name, breaks(getattr(GraloraLinear, name)))
        yield
