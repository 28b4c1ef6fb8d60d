# SPDX-License-Identifier: Apache-2.0
"""add_weighted_adapter: what is refused, and that nothing has changed then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from adapter_helpers import WEIGHTS, WithHead, delta, layers, summed, two
from torch import nn
from tuner_helpers import needs_new_peft

from gralora_ext.tuner import enable, weighted

pytestmark = needs_new_peft


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    with enable():
        yield


CAT = {"combination_type": "cat"}
SET_LATER = {"trainable_token_indices", "bias"}  # which the model of these tests has no place for


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({}, {"adapters": ["one", "third"]}, r"adapters: 'third' does not exist, expected some of \['one', 'two'\]"),
        ({}, {"adapters": [], "weights": []}, "adapters: expected the names of one or more, got none"),
        ({}, {"weights": [1.0]}, "weights: expected one for each of 2 adapters, got 1"),
        ({}, {"combination_type": "mean"}, "combination_type: expected one of cat, linear, .*, got 'mean'"),
        ({"gralora_k": 3}, CAT, "first: the gralora_k of all adapters must agree .*'one': 2, 'two': 3"),
        ({"r": 6}, {"combination_type": "linear"}, r"first: r and hybrid_r .*r are \[12, 6\] and hybrid_r \[0, 0\]"),
        ({"hybrid_r": 2}, {"combination_type": "linear"}, r"first: r and hybrid_r of all .*hybrid_r \[0, 2\]"),
        ({"rank_pattern": {"second": 6}}, {"combination_type": "linear"}, r"second: r and hybrid_r .*\[12, 6\]"),
        ({}, {"svd_rank": 0}, "svd_rank: expected a positive integer, got 0"),
        ({}, {"svd_rank": 7}, "svd_rank: expected a multiple of gralora_k, which is 2 in first, got 7"),
        ({}, {"combination_type": "ties"}, "density: expected a number from 0 to 1 .*'ties', got None"),
        ({}, {"majority_sign_method": "all"}, "majority_sign_method: expected 'total' or 'frequency', got 'all'"),
        ({"target_modules": "first"}, CAT, "adapters: the target_modules of some are a text"),
        ({"modules_to_save": ["head"]}, CAT, "adapters: more than one of them has trained a copy of the same module"),
        ({"trainable_token_indices": {"head": [1]}}, CAT, "adapters: 'two' has trained tokens"),
        ({"bias": "all"}, CAT, "adapters: 'two' has trained biases .*bias='all'.*, which are not combined"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(fields: Any, arguments: Any, message: str) -> None:
    a = {"modules_to_save": ["head"]} if "modules_to_save" in fields else {}
    model = two(a, {key: value for key, value in fields.items() if key not in SET_LATER}, base=WithHead)
    for key in SET_LATER & set(fields):
        setattr(model.peft_config["two"], key, fields[key])
    before = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(
            **{"adapters": ["one", "two"], "weights": WEIGHTS, "adapter_name": "sum", **arguments}
        )
    assert [n for n, _ in model.named_parameters()] == before and list(model.peft_config) == ["one", "two"]


def test_an_injection_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    before = [n for n, _ in model.named_parameters()]
    update = type(layers(model)["second"]).update_layer

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        if self is layers(model)["second"]:
            raise MemoryError

    monkeypatch.setattr(type(layers(model)["second"]), "update_layer", fail)
    with pytest.raises(MemoryError):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", **CAT)
    assert [n for n, _ in model.named_parameters()] == before and list(model.peft_config) == ["one", "two"]
    assert model.active_adapters == ["one"]


@pytest.mark.parametrize("where", ["a layer", "a trained copy"])
def test_a_sum_that_is_broken_off_while_it_is_filled_can_be_asked_for_again(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two({"modules_to_save": ["head"]}, base=WithHead)
    before = [n for n, _ in model.named_parameters()]
    put, filled = weighted._put, []

    def stop(layer: Any, *args: Any) -> None:
        if filled:
            raise KeyboardInterrupt
        filled.append(layer)
        put(layer, *args)

    def stop_copying(self: nn.Module, *args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "a layer":
            patch.setattr(weighted, "_put", stop)
        else:
            patch.setattr(nn.Linear, "load_state_dict", stop_copying)
        with pytest.raises(KeyboardInterrupt):
            model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", **CAT)
    assert [n for n, _ in model.named_parameters()] == before and list(model.peft_config) == ["one", "two"]
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", **CAT)
    for layer in layers(model).values():
        torch.testing.assert_close(delta(layer, "sum"), summed(layer), rtol=1e-12, atol=1e-14)


def test_a_module_that_one_adapter_trains_whole_and_another_adapts_is_named() -> None:
    model = two(
        {"modules_to_save": ["head"], "gralora_k": 3}, {"target_modules": "all-linear", "gralora_k": 3}, WithHead
    )
    before = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="^adapters: one of them adapts head.original_module, and another has trained"):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", **CAT)
    assert [n for n, _ in model.named_parameters()] == before and list(model.peft_config) == ["one", "two"]


def test_an_older_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(RuntimeError, match="^add_weighted_adapter needs peft 0.21.0 or newer, found 0.20.0: run"):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum")
