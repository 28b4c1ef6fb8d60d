# SPDX-License-Identifier: Apache-2.0
"""Merging or unmerging a whole model is done in all layers or in none."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from helpers import same_bits
from peft import get_peft_model
from tuner_helpers import DEVICE, Conv1DMlp, Mlp, adapted, config, llama, needs_new_peft

from gralora_ext import GraloraConfig
from gralora_ext.tuner import GraloraLinear, accelerate, chunked, enable, layer, transaction

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


@exactly
@each_call
@pytest.mark.parametrize("error", [Broken(), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("base", [Conv1DMlp, llama])
def test_work_that_breaks_at_any_layer_changes_nothing(
    base: Any, after: bool, error: BaseException, call: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(base, exact=exact, call=call)
    before = State(model)
    for at in range(len(layers(model))):
        with breaking(monkeypatch, at, error, after), pytest.raises(type(error)):
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
    while True:
        number += 1
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
