# SPDX-License-Identifier: Apache-2.0
"""Putting a model back after a merge that broke off: interrupted once more, without memory, and in the right order."""

from __future__ import annotations

import signal
import warnings
from typing import Any

import pytest
import torch
from helpers import same_bits
from transaction_helpers import CALLS, Broken, State, Wider, breaking, each_call, exactly, layers, model_of
from tuner_helpers import adapted, config, llama

from gralora_ext.tuner import chunked, layer


def test_a_second_interruption_waits_until_all_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    before = State(model)
    right = layer.exact.put_back

    def put_back(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        right(*args)

    monkeypatch.setattr(layer.exact, "put_back", put_back)
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started without it
    try:
        with breaking(monkeypatch, 1, Broken(), True), pytest.raises(KeyboardInterrupt):
            model.merge_adapter()
        before.assert_same(model)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)


@pytest.mark.parametrize("plain_torch", [False, True], ids=["kernels", "plain torch"])
def test_an_interruption_while_a_layer_puts_back_two_adapters_waits(
    plain_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer alone, without all_or_nothing: both adapters are added again before Ctrl-C is heard."""
    if plain_torch:
        monkeypatch.setattr(layer.exact, "_has_kernel", lambda weight: False)
        monkeypatch.setattr(chunked, "ELEMENTS", 200)
    model = model_of(Wider)
    model.add_adapter("third", config(r=4))
    one = layers(model)[0]
    one.merge(adapter_names=["default", "other"])
    before, right = State(model), layer.exact.add
    with torch.no_grad():
        one.gralora_B["third"][0, 0, 0] = float("inf")

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        right(*arguments)

    def broken(self: Any, weight: torch.Tensor, to: torch.Tensor) -> None:
        monkeypatch.setattr(layer.exact, "add", interrupted)
        monkeypatch.setattr(chunked, "add", interrupted)
        raise Broken

    monkeypatch.setattr(layer.exact.Kept, "merge", broken)
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            one.merge(adapter_names=["third"])
    finally:
        signal.signal(signal.SIGINT, outside)
    after = State(model)
    assert after.merged == before.merged
    name = "base_model.model.first.base_layer.weight"
    assert same_bits(after.weights[name], before.weights[name])


@each_call
def test_a_layer_that_has_no_memory_to_be_put_back_is_tried_again_after_the_others(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(llama, call=call)
    before, right, failures = State(model), layer.exact.put_back, 3

    def put_back(*arguments: Any) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise torch.OutOfMemoryError
        right(*arguments)

    last = 0 if call == "unmerge" else len(layers(model)) - 1
    with breaking(monkeypatch, last, Broken(), False), pytest.raises(Broken):
        monkeypatch.setattr(layer.exact, "put_back", put_back)
        CALLS[call](model)
    assert failures < 0
    before.assert_same(model)


def test_layers_that_cannot_be_put_back_are_told_and_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    before, right = State(model), layer.exact.put_back
    broken = layers(model)[0]

    def put_back(weight: torch.Tensor, *arguments: Any) -> None:
        if weight is broken.base_layer.weight:
            raise torch.OutOfMemoryError
        right(weight, *arguments)

    with (
        breaking(monkeypatch, 1, Broken(), True),
        pytest.raises(RuntimeError, match="1 of the layers could not be put back"),
    ):
        monkeypatch.setattr(layer.exact, "put_back", put_back)
        model.merge_adapter()
    name = "base_model.model.second.base_layer.weight"
    assert same_bits(State(model).weights[name], before.weights[name])
    assert all(module.journal is None for module in layers(model))


@exactly
@pytest.mark.parametrize("call", ["merge_adapter", "unmerge_adapter"])
def test_weights_that_were_loaded_meanwhile_are_left_as_they_are(
    call: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the bits of before the merge, so that only what was taken off may be put on again."""
    model = model_of(exact=exact)
    original = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter(adapter_names=["default"])
    model.load_state_dict(original, strict=False)
    before = State(model)
    arguments = {"adapter_names": ["other"]} if call == "merge_adapter" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with breaking(monkeypatch, 1, Broken(), False), pytest.raises(Broken):
            getattr(model, call)(**arguments)
    before.assert_same(model)


@each_call
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_layers_that_share_a_weight_are_put_back_in_the_right_order(
    call: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.first, self.second = (torch.nn.Linear(64, 64) for _ in range(3))
            self.second.weight = self.first.weight

    model = adapted("fused", Shared, torch.bfloat16, target_modules=["x", "first", "second"])
    if call == "unmerge":
        model.merge_adapter()
    before = State(model)
    for at in range(3):
        with breaking(monkeypatch, at, Broken(), after), pytest.raises(Broken):
            CALLS[call](model)
        before.assert_same(model)
