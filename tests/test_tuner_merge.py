# SPDX-License-Identifier: Apache-2.0
"""Merging adds the adapter to the base weight in place, and unmerging takes it away again."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import MERGE_MISROUNDED, NAMES, same_bits
from peft import convert_to_lora
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor
from transformers.pytorch_utils import Conv1D
from tuner_helpers import (
    DEVICE,
    Conv1DMlp,
    Mlp,
    Single,
    adapted,
    assert_same_output,
    config,
    gpt2,
    llama,
    pair,
    rows,
    tokens,
)

from gralora_ext import reference

BASES = [Mlp, Conv1DMlp]


def with_two_adapters(tuner: str = "fused", base: Any = Mlp) -> Any:
    model = adapted(tuner, base)
    model.add_adapter("other", config(r=6, gralora_k=3, hybrid_r=2, fan_in_fan_out=base is Conv1DMlp))
    return model


@pytest.mark.parametrize("safe", [False, True], ids=["in place", "safe"])
@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("base", BASES)
def test_merged_weight_is_pefts_and_gives_the_adapters_output(base: Any, k: int, hybrid_r: int, safe: bool) -> None:
    stock, fused = pair(base, gralora_k=k, hybrid_r=hybrid_r)
    x = rows(5)
    expected = fused(x)
    for model in (stock, fused):
        model.merge_adapter(safe_merge=safe)
    for name in ("first", "second"):
        a, b = (model.base_model.model.get_submodule(name) for model in (fused, stock))
        assert a.merged and a.merged_adapters == b.merged_adapters == ["default"]
        assert_same_output(a.base_layer.weight, b.base_layer.weight)
    assert_same_output(fused(x), expected)


@pytest.mark.parametrize("base", BASES)
def test_delta_weight_is_pefts(base: Any) -> None:
    stock, fused = pair(base, hybrid_r=3)
    layers = [model.base_model.model.first for model in (fused, stock)]
    deltas = [layer.get_delta_weight("default") for layer in layers]
    assert deltas[0].shape == layers[0].base_layer.weight.shape
    assert_same_output(*deltas)


@pytest.mark.parametrize("base", BASES)
def test_unmerge_restores_the_base(base: Any) -> None:
    model = with_two_adapters(base=base)
    model.base_model.set_adapter(["default", "other"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    y = model(rows(5))
    model.merge_adapter()
    assert model.base_model.model.first.merged_adapters == ["default", "other"]
    model.unmerge_adapter()
    assert model.base_model.model.first.merged_adapters == []
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=1e-14, atol=1e-14)
    assert_same_output(model(rows(5)), y)


def test_merge_writes_into_the_weight_itself_and_safe_merge_swaps_it() -> None:
    layer = adapted("fused").base_model.model.first
    weight, storage = layer.base_layer.weight, layer.base_layer.weight.data_ptr()
    layer.merge()
    layer.unmerge()
    assert layer.base_layer.weight is weight and weight.data_ptr() == storage
    layer.merge(safe_merge=True)
    assert layer.base_layer.weight is weight and weight.data_ptr() != storage


@pytest.mark.parametrize("base", BASES)
def test_safe_merge_of_a_broken_adapter_changes_nothing_for_it(base: Any) -> None:
    model = with_two_adapters(base=base)
    layer = model.base_model.model.first
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    with torch.no_grad():
        layer.gralora_B["other"][0, 0, 0] = float("inf")
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="The adapter other seems to be broken.*NaN or infinity"):
        layer.merge(safe_merge=True, adapter_names=["other"])
    assert same_bits(layer.base_layer.weight.detach(), before) and not layer.merged
    with pytest.raises(ValueError, match="The adapter other seems"):
        layer.merge(safe_merge=True, adapter_names=["default", "other"])
    assert layer.merged_adapters == ["default"]
    assert_same_output(layer.base_layer.weight, expected)


def test_named_adapters_are_merged_once_each() -> None:
    model = with_two_adapters()
    layer, weight = model.base_model.model.first, model.base_model.model.first.base_layer.weight.detach().clone()
    layer.merge(adapter_names=["other"])
    assert_same_output(layer.base_layer.weight, weight + layer.get_delta_weight("other"))
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge(adapter_names=["other"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        layer.merge(adapter_names=["default", "other", "absent"])
    assert layer.merged_adapters == ["other", "default"]
    assert_same_output(
        layer.base_layer.weight, weight + layer.get_delta_weight("other") + layer.get_delta_weight("default")
    )
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    with pytest.raises((TypeError, ValueError), match="list of strings"):  # by the release of PEFT
        layer.merge(adapter_names="default")


@pytest.mark.parametrize("safe", [False, True], ids=["in place", "safe"])
@pytest.mark.parametrize("base", [llama, gpt2])
def test_merge_and_unload_returns_the_plain_model(base: Any, safe: bool) -> None:
    targets = ["q_proj", "down_proj"] if base is llama else ["c_attn", "c_fc"]
    model = adapted("fused", base, target_modules=targets, hybrid_r=2).eval()
    expected = model(input_ids=tokens(2, 6)).logits
    merged = model.merge_and_unload(safe_merge=safe)
    kind = nn.Linear if base is llama else Conv1D
    assert all(type(module) is kind for name, module in merged.named_modules() if name.rpartition(".")[2] in targets)
    assert not any("gralora" in key for key in merged.state_dict())
    assert_same_output(merged(input_ids=tokens(2, 6)).logits, expected)


def test_unload_returns_the_base_model() -> None:
    model = adapted("fused")
    expected = model.base_model.model.first.base_layer.weight.clone()
    base = model.unload()
    assert type(base) is Mlp and type(base.first) is nn.Linear and same_bits(base.first.weight.data, expected.detach())


def test_disabling_merged_adapters_unmerges_them() -> None:
    model = adapted("fused")
    x = rows(5)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            assert_same_output(model(x), base)
    assert not model.base_model.model.first.merged
    assert_same_output(model(x), y)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_16_bit_merge_is_correctly_rounded(dtype: torch.dtype, base: Any) -> None:
    model = adapted("fused", base, dtype, hybrid_r=3)
    layer = model.base_model.model.first
    operands = {"A": layer.gralora_A["default"], "B": layer.gralora_B["default"], "scaling": layer.scaling["default"]}
    general = [getattr(layer, f"gralora_{name}_general")["default"].weight for name in "AB"]
    expected = layer.base_layer.weight.detach().double().clone()
    reference.merge_(
        expected, **operands, A_general=general[0], B_general=general[1], fan_in_fan_out=layer.fan_in_fan_out
    )
    layer.merge()
    wrong = (layer.base_layer.weight != expected.to(dtype)).double().mean()
    assert wrong < MERGE_MISROUNDED


def test_merge_under_gradients_is_seen_by_autograd() -> None:
    model = adapted("fused", bias="all")
    layer = model.base_model.model.first
    loss = layer(rows(3).requires_grad_()).sum()
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("safe", [False, True], ids=["in place", "safe"])
def test_base_weight_that_cannot_take_a_merge_gives_an_error(safe: bool) -> None:
    layer = adapted("fused").base_model.model.first
    weight = layer.base_layer.weight.data
    layer.base_layer.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=f"base weight is on meta, but adapter 'default' is on {DEVICE}"):
        layer.merge(safe_merge=safe)
    layer.base_layer.weight = nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="uint8"):
        layer.merge(safe_merge=safe)
    layer.base_layer.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    with pytest.raises(TypeError, match="float64 of class TwoTensor: dequantize or gather"):
        layer.merge(safe_merge=safe)
    assert not layer.merged


def test_a_fake_weight_takes_a_merge() -> None:
    layer = adapted("fused").base_model.model.first
    mode = FakeTensorMode()
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(mode.from_tensor(parameter.data), requires_grad=False))
    with mode:
        layer.merge()
    assert layer.merged


def test_pefts_conversion_to_lora_keeps_the_delta_weight() -> None:
    model = adapted("fused", Single, target_modules=["first"], r=4)
    lora, state = convert_to_lora(model, rank=8)  # k·r, so that nothing is cut off
    A, B = (state[f"base_model.model.first.lora_{name}.weight"] for name in "AB")
    delta = model.base_model.model.first.get_delta_weight("default")
    torch.testing.assert_close(lora.lora_alpha / lora.r * (B @ A), delta, rtol=0, atol=1e-5)  # PEFT's SVD is in float32


@pytest.mark.parametrize(
    "computed",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ],
    ids=["parametrized weight_norm", "parametrized orthogonal", "weight_norm", "spectral_norm", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_computed_at_every_call_is_not_merged_into(computed: Any) -> None:
    """What is written into it would be gone at the next call."""
    model = adapted("fused", Single, target_modules=["first"]).eval()
    computed(model.base_model.model.first.base_layer)
    expected = model(rows(3))
    with pytest.raises(TypeError, match="that of first is computed at every call"):
        model.merge_adapter()
    assert_same_output(model(rows(3)), expected)
