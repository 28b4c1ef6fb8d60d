# SPDX-License-Identifier: Apache-2.0
"""enable/disable choose the tuner for models to come; accelerate/restore change models that exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from helpers import run_python, same_bits
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftType, get_peft_model, inject_adapter_in_model
from peft.tuners.gralora import GraloraModel as StockModel
from peft.tuners.gralora.layer import Linear as StockLinear
from torch import nn
from tuner_helpers import (
    DEVICE,
    Conv1DMlp,
    Mlp,
    adapted,
    assert_same_gradients,
    assert_same_output,
    config,
    fused_layers,
    llama,
    needs_new_peft,
    rows,
    stock_layers,
    tokens,
)

from gralora_ext.tuner import GraloraConfig, GraloraLinear, GraloraModel, Report, accelerate, disable, enable, restore


def active() -> type:
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType.GRALORA]


@pytest.fixture(autouse=True)
def stock_before_and_after() -> Any:
    assert active() is StockModel
    yield
    disable()
    assert active() is StockModel


def test_enable_stays_until_disable_and_both_may_be_repeated() -> None:
    enable()
    enable()
    assert active() is GraloraModel and fused_layers(get_peft_model(Mlp(), config()))
    disable()
    disable()
    assert active() is StockModel and not fused_layers(get_peft_model(Mlp(), config()))


def test_with_blocks_restore_what_was_there_before() -> None:
    with enable():
        assert active() is GraloraModel
        with enable():
            assert active() is GraloraModel
        assert active() is GraloraModel
        disable()
        with pytest.raises(KeyError), enable():
            raise KeyError
        assert active() is StockModel
    assert active() is StockModel
    enable()
    with enable():
        disable()
    assert active() is GraloraModel


def test_activation_may_be_used_again() -> None:
    activation = enable()
    disable()
    for _ in range(2):
        with activation, activation:
            assert active() is GraloraModel
        assert active() is StockModel
    enable()
    with activation:
        pass
    assert active() is GraloraModel, "what counts is the tuner at the entry of the block"
    second = enable()
    disable()
    with second:
        assert active() is GraloraModel
    assert active() is StockModel


def test_disable_leaves_the_tuner_of_someone_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(StockModel):
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.GRALORA, Other)
    with enable():
        assert active() is GraloraModel
    disable()
    assert active() is Other


def test_package_offers_the_plugin_and_importing_it_changes_nothing() -> None:
    code = """
import peft, gralora_ext
stock = peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.GRALORA]
assert stock is peft.GraloraModel
with gralora_ext.enable():
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.GRALORA] is gralora_ext.GraloraModel
assert peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.GRALORA] is stock
print(gralora_ext.accelerate.__name__, gralora_ext.restore.__name__, gralora_ext.disable.__name__)
"""
    assert run_python(code).split() == ["accelerate", "restore", "disable"]


@pytest.mark.parametrize("base", [Mlp, Conv1DMlp, llama])
def test_accelerate_and_restore_change_only_the_class(base: Any) -> None:
    model = adapted("stock", base, hybrid_r=2, target_modules="all-linear" if base is llama else ["first", "second"])
    batch = {"input_ids": tokens(2, 5)} if base is llama else {"x": rows(5)}
    names, before = stock_layers(model), [(n, p, p.detach().clone()) for n, p in model.named_parameters()]
    expected = model(**batch)
    report = accelerate(model)
    assert (report.converted, report.skipped) == (len(names), [])
    assert fused_layers(model) == names and type(model.base_model) is GraloraModel
    _assert_outputs(model(**batch), expected)
    assert accelerate(model).converted == 0
    assert restore(model) == report
    assert stock_layers(model) == names and type(model.base_model) is StockModel
    _assert_outputs(model(**batch), expected, exactly=True)
    assert restore(model).converted == 0
    after = list(model.named_parameters())
    assert len(after) == len(before)
    for (name, p), (name_before, p_before, value) in zip(after, before, strict=True):
        assert name == name_before and p is p_before and same_bits(p.detach(), value)


def _assert_outputs(y: Any, expected: Any, exactly: bool = False) -> None:
    y, expected = (getattr(value, "logits", value) for value in (y, expected))
    assert torch.equal(y, expected) if exactly else assert_same_output(y, expected) is None


def test_accelerate_in_the_middle_of_training_continues_it() -> None:
    results = []
    for convert in (None, accelerate):
        model = adapted("stock", hybrid_r=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(6):
            if step == 3 and convert:
                convert(model)
            optimizer.zero_grad()
            model(rows(8, seed=step)).square().mean().backward()
            optimizer.step()
        results.append(model)
    assert_same_gradients(results[1], results[0])
    for a, b in zip(results[1].parameters(), results[0].parameters(), strict=True):
        assert_same_output(a, b)


def test_accelerate_works_on_injected_and_nested_models_and_on_others() -> None:
    injected = inject_adapter_in_model(config(), Mlp())
    assert accelerate(injected).converted == 2 and len(fused_layers(injected)) == 2
    nested = nn.ModuleDict({"a": adapted("stock"), "b": nn.Linear(3, 3)})
    assert accelerate(nested).converted == 2
    assert accelerate(Mlp()) == Report(0, [])
    assert accelerate(get_peft_model(Mlp(), LoraConfig(target_modules=["first"]))) == Report(0, [])
    assert accelerate(adapted("fused")) == Report(0, [])
    single = adapted("stock").base_model.model.first
    assert accelerate(single).converted == 1 and type(single) is GraloraLinear


@pytest.mark.parametrize("function", [accelerate, restore])
@pytest.mark.parametrize("value", [None, "model", Mlp])
def test_other_things_than_modules_are_refused(function: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
        function(value)


def test_adapters_added_after_accelerate_are_fused_and_adapter_names_are_no_longer_ignored() -> None:
    model = adapted("stock", target_modules=["first"])
    accelerate(model)
    model.add_adapter("other", config(target_modules=["second"]))
    assert len(fused_layers(model)) == 2
    with pytest.raises(ValueError, match="adapter_names: expected a model in evaluation mode"):
        model.train()(rows(2), adapter_names=["default", "other"])


def test_merged_layers_may_be_converted_and_unmerged_by_the_other() -> None:
    model = adapted("stock")
    weight = model.base_model.model.first.base_layer.weight.detach().clone()
    model.merge_adapter()
    accelerate(model)
    model.unmerge_adapter()
    assert_same_output(model.base_model.model.first.base_layer.weight, weight)


def test_hooks_survive() -> None:
    model = adapted("stock")
    layer, calls = model.base_model.model.first, []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.base_layer.register_forward_pre_hook(lambda *_: calls.append("base"))
    accelerate(model)
    model(rows(2))
    assert calls == ["base", "forward"]


class Shift(ModelHook):
    """An Accelerate hook that shows that it was called, and with what."""

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output + 1.0


def test_accelerates_hooks_are_rebound_both_ways() -> None:
    model, x = adapted("stock"), rows(3)
    layer = model.base_model.model.first
    plain = layer(x)
    add_hook_to_module(layer, Shift())
    assert accelerate(model).converted == 2
    assert layer._old_forward.__func__ is GraloraLinear.forward and layer._old_forward.__self__ is layer
    assert_same_output(layer(x), plain + 1.0)
    with pytest.raises(ValueError, match="adapter_names"):
        layer(x, adapter_names=["default"])
    assert restore(model).converted == 2
    assert layer._old_forward.__func__ is StockLinear.forward
    accelerate(model)
    remove_hook_from_module(layer)
    assert_same_output(layer(x), plain)
    assert layer.forward.__func__ is GraloraLinear.forward
    restore(model)
    assert layer.forward.__func__ is StockLinear.forward and torch.equal(layer(x), plain)


class Derived(StockLinear):
    pass


def derive(layer: nn.Module) -> None:
    layer.__class__ = Derived


def replace_forward(layer: nn.Module) -> None:
    layer.forward = lambda x: x


def replace_dropout(layer: nn.Module) -> None:
    layer.gralora_dropout["default"] = nn.AlphaDropout(0.1)


def take_weight(layer: nn.Module) -> None:
    layer.base_layer = nn.Identity()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (derive, "Derived is not peft.tuners.gralora.layer.Linear itself"),
        (replace_forward, "forward has been replaced by <function"),
        (replace_dropout, "dropout is a AlphaDropout"),
        (take_weight, "base layer Identity has no weight"),
    ],
)
def test_layers_that_are_not_pefts_own_are_skipped_with_the_reason(change: Any, reason: str) -> None:
    model = adapted("stock")
    layer = model.base_model.model.first
    change(layer)
    kind = type(layer)
    report = accelerate(model)
    assert report.converted == 1 and type(layer) is kind
    assert [name for name, _ in report.skipped] == ["base_model.model.first"] and reason in report.skipped[0][1]
    assert repr(report).startswith("1 GraLoRA layers converted, 1 skipped\n  base_model.model.first: its ")


def test_quantized_base_is_converted_since_only_its_output_is_used() -> None:
    class Int8(nn.Linear):
        """Keeps a rounded weight and a scale, as the quantized layers do that PEFT adapts."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features, device="meta")
            self.step = linear.weight.abs().max() / 127
            self.weight = nn.Parameter((linear.weight / self.step).round().to(torch.int8), requires_grad=False)
            self.bias = linear.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.step.to(x.dtype), self.bias)

    base = Mlp().to(DEVICE)
    base.first = Int8(base.first)
    model = get_peft_model(base, config(target_modules=["first"]))
    x = rows(3, dtype=torch.float32)
    expected = model(x)
    assert accelerate(model).converted == 1
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(TypeError, match="int8"):
        model.merge_adapter()


@needs_new_peft
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"first": 6}},
        {"alpha_pattern": {"first": 6}},
        {"k_pattern": {"first": 3}},
        {"use_rslora": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_restore_leaves_by_name_what_pefts_tuner_would_misread(fields: dict[str, Any], merged: bool) -> None:
    torch.manual_seed(0)
    with enable():
        values = {"r": 12, "alpha": 24, "target_modules": ["first", "second"], "init_weights": False}
        model = get_peft_model(Mlp().double(), GraloraConfig(**values, **fields)).to(DEVICE)
        y = model(rows(3))
        if merged:
            model.merge_adapter()
        report = restore(model)
        assert report.converted == 0 and len(report.skipped) == 2
        expected = "bit for bit" if merged else f"adapter 'default' has {next(iter(fields))}, which"
        assert all(expected in reason for _, reason in report.skipped)
        assert type(model.base_model) is GraloraModel and len(fused_layers(model)) == 2
        torch.testing.assert_close(model(rows(3)), y)
        if merged:
            model.unmerge_adapter()
        model.add_adapter("plain", config(**values))
        model.delete_adapter("default")
        assert restore(model).converted == 2 and not fused_layers(model)


@needs_new_peft
def test_restore_judges_each_model_of_several_by_its_own_adapters() -> None:
    with enable():
        marked, plain = (get_peft_model(Mlp().double(), GraloraConfig(r=12, target_modules=["first"])) for _ in "ab")
        rooted = GraloraConfig(r=12, target_modules=["first"], use_rslora=True)
        marked.add_adapter("rooted", rooted)
        plain.add_adapter("rooted", config(target_modules=["first", "second"]))
    for several in (nn.ModuleList([marked, plain]), nn.ModuleList([plain, marked])):
        accelerate(several)
        report = restore(several)
        assert (report.converted, len(report.skipped)) == (2, 1)
        assert "adapter 'rooted' has use_rslora, which" in report.skipped[0][1]
        assert type(marked.base_model) is GraloraModel and fused_layers(marked)
        assert type(plain.base_model) is StockModel and not fused_layers(plain)
