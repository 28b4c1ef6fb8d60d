# SPDX-License-Identifier: Apache-2.0
"""Merging or unmerging a whole model is done in all layers or in none."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from helpers import same_bits
from peft import get_peft_model
from transaction_helpers import CALLS, Broken, State, Wider, breaking, each_call, exactly, layers, model_of
from tuner_helpers import DEVICE, Conv1DMlp, Mlp, adapted, llama, needs_new_peft

from gralora_ext import GraloraConfig
from gralora_ext.tuner import GraloraLinear, accelerate, chunked, enable, layer, transaction


@exactly
@each_call
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("base", [Conv1DMlp, llama])
def test_work_that_breaks_at_any_layer_changes_nothing(
    base: Any, after: bool, call: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(base, exact=exact, call=call)
    before = State(model)
    for at in range(len(layers(model))):
        with breaking(monkeypatch, at, KeyboardInterrupt(), after), pytest.raises(KeyboardInterrupt):
            CALLS[call](model)
        before.assert_same(model)


@contextmanager
def interrupted_at_line(number: int, files: set[str]) -> Iterator[list[int]]:
    """Raises KeyboardInterrupt before the ``number``-th line of ``files`` that is run, and counts them."""
    count = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count[0] += 1
            if count[0] == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(previous)


@each_call
@pytest.mark.parametrize("at", range(0, 40, 3))
def test_an_interruption_between_chunks_of_plain_torch_changes_nothing(
    call: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer.exact, "_has_kernel", lambda weight: False)
    monkeypatch.setattr(chunked, "ELEMENTS", 200)
    model = model_of(Wider, call=call)
    before, right, count = State(model), chunked._add_to_rows, 0

    def breaks(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count - 1 == at:
            raise KeyboardInterrupt
        right(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chunked, "_add_to_rows", breaks)
        CALLS[call](model)
    before.assert_same(model)


@exactly
@each_call
def test_an_interruption_before_any_line_changes_all_or_nothing(call: str, exact: bool) -> None:
    files = {
        sys.modules[f"gralora_ext.tuner.{name}"].__file__ or "" for name in ("layer", "exact", "model", "transaction")
    }
    number, interrupted, last = 0, 0, transaction.all_or_nothing.__code__
    assert last.co_filename in files
    model = None
    while True:
        number += 1
        if model is None:
            model = model_of(exact=exact, call=call)
            before = State(model)
        with interrupted_at_line(number, files):
            try:
                CALLS[call](model)
                break
            except KeyboardInterrupt:
                interrupted += 1
        after = [bool(module.merged_adapters) for module in layers(model)]
        done = len(after) == 0 or (all(after) != (call == "unmerge") and len(set(after)) == 1)
        if not done:
            before.assert_same(model)
        else:  # it came when all was done
            assert all(module.journal is None for module in layers(model))
            model = None
    assert interrupted > 100


@exactly
def test_a_safe_merge_of_a_broken_adapter_changes_no_layer(exact: bool) -> None:
    model = model_of(exact=exact)
    with torch.no_grad():
        layers(model)[-1].gralora_B["other"][0, 0, 0] = float("inf")
    before = State(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="The adapter other seems to be broken"):
            call(safe_merge=True)
        before.assert_same(model)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_an_adapter_that_the_model_lacks_is_named_before_anything_is_changed(call: str) -> None:
    model = model_of()
    before = State(model)
    with pytest.raises(ValueError, match="adapter_names: the model has no adapter 'absent'; it has 'default', 'other'"):
        getattr(model, call)(adapter_names=["default", "absent"])
    before.assert_same(model)


def test_a_weight_that_takes_no_merge_leaves_the_others_alone() -> None:
    model = model_of()
    last = layers(model)[-1].base_layer
    last.weight = torch.nn.Parameter(last.weight.to(torch.uint8), requires_grad=False)
    before = State(model)
    with pytest.raises(TypeError, match="merging needs a dense floating-point base weight"):
        model.merge_adapter()
    before.assert_same(model)


def test_more_adapters_that_break_leave_the_merged_ones_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    original = State(model)
    model.merge_adapter(adapter_names=["default"])
    before = State(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with breaking(monkeypatch, 1, Broken(), True), pytest.raises(Broken):
            model.merge_adapter(adapter_names=["other"])
    before.assert_same(model)
    model.unmerge_adapter()
    original.assert_same(model)


def test_layers_that_are_not_ours_are_put_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("stock", Mlp, torch.bfloat16)
    model.base_model.model.first.gralora_dropout["default"] = torch.nn.AlphaDropout(0.1)  # accelerate() skips it
    assert accelerate(model).converted == 1
    before = State(model)
    with breaking(monkeypatch, 0, Broken(), True), pytest.raises(Broken):
        model.merge_adapter()
    before.assert_same(model)
    model.merge_adapter()
    assert not same_bits(
        model.base_model.model.first.base_layer.weight.detach(),
        before.weights["base_model.model.first.base_layer.weight"],
    )


@needs_new_peft
def test_trained_tokens_are_put_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"trainable_token_indices": {"embed_tokens": [1, 2]}}
    with enable():
        made = GraloraConfig(r=4, gralora_k=2, target_modules=["q_proj"], init_weights=False, **fields)
        model = get_peft_model(llama().to(torch.bfloat16), made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    before = State(model)
    for at in range(2):
        with breaking(monkeypatch, at, Broken(), True), pytest.raises(Broken):
            model.merge_adapter()
        before.assert_same(model)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the device of execution is the CPU here")
def test_offloaded_weights_are_put_back_and_unmerged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(call="merge")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    cpu_offload(model, torch.device("cpu"))

    def stored() -> dict[str, torch.Tensor]:
        return {
            name: module.base_layer._hf_hook.weights_map["weight"].clone()
            for name, module in model.named_modules()
            if isinstance(module, GraloraLinear)
        }

    before = stored()
    for at in range(2):
        with breaking(monkeypatch, at, Broken(), True), pytest.raises(Broken):
            model.merge_adapter()
        assert all(same_bits(weight, before[name]) for name, weight in stored().items())
    model.merge_adapter()
    assert not any(same_bits(weight, before[name]) for name, weight in stored().items())
    model.unmerge_adapter()
    assert all(same_bits(weight, weights[f"{name}.base_layer.weight"]) for name, weight in stored().items())


@exactly
@pytest.mark.parametrize("plain_torch", [False, True], ids=["kernels", "plain torch"])
def test_a_safe_merge_of_a_weight_with_gaps_unmerges_to_the_bits_of_before(
    exact: bool, plain_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of columns of a wider tensor, as of a joined projection that was cut."""
    if plain_torch:
        monkeypatch.setattr(layer.exact, "_has_kernel", lambda weight: False)
    model = model_of(exact=exact)
    one = layers(model)[0]
    weight = one.base_layer.weight
    wide = torch.zeros(weight.shape[0], 2 * weight.shape[1], dtype=weight.dtype, device=weight.device)
    wide[:, ::2] = weight.detach()
    one.base_layer.weight = torch.nn.Parameter(wide[:, ::2], requires_grad=False)
    before = weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(safe_merge=True)
        assert not same_bits(one.base_layer.weight.detach(), before)
        model.unmerge_adapter()
    if exact:
        assert same_bits(one.base_layer.weight.detach(), before)
