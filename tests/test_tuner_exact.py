# SPDX-License-Identifier: Apache-2.0
"""Unmerging gives back the bits of before the first merge, over and over, and what a merge gives and keeps for that."""

from __future__ import annotations

import random
import warnings
import weakref
from typing import Any

import pytest
import torch
from exact_helpers import assert_as_before, change_adapters, layer_of, weights, wide, with_two
from helpers import NAMES, same_bits
from torch import Tensor
from tuner_helpers import Conv1DMlp, Mlp, config, rows

from gralora_ext.tuner import GraloraLinear, chunked, exact
from gralora_ext.tuner.exact import Kept

BASES = [Mlp, Conv1DMlp]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
each_kind = pytest.mark.parametrize("base", BASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


# ---------------------------------------------------------------- cycles


@each_dtype
@each_kind
@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_a_hundred_cycles_change_no_bit(base: Any, hybrid_r: int, dtype: torch.dtype) -> None:
    model = with_two(base, dtype, hybrid_r=hybrid_r)
    before = weights(model)
    for cycle in range(100):
        names = (["default"], ["other"], ["default", "other"], ["other", "default"])[cycle % 4]
        model.merge_adapter(adapter_names=names)
        model.unmerge_adapter()
    assert_as_before(model, before)


@each_dtype
def test_codes_lead_back_for_a_hundred_cycles(dtype: torch.dtype) -> None:
    model = wide(dtype)
    before = weights(model)
    for _ in range(100):
        model.merge_adapter()
        assert layer_of(model).kept_merge.copy is None
        model.unmerge_adapter()
    assert_as_before(model, before)


def step(model: Any, chance: random.Random) -> None:
    """A random thing that a user does."""
    names = list(model.peft_config)
    some = chance.sample(names, chance.randint(1, len(names)))
    what = chance.choice(
        ["merge", "merge", "safe", "layer", "unmerge", "set", "train", "add", "delete", "scale", "off"]
    )
    if what in ("merge", "safe"):
        model.merge_adapter(adapter_names=chance.choice([None, some]), safe_merge=what == "safe")
    elif what == "layer":
        layer_of(model).merge(adapter_names=some)
    elif what == "unmerge":
        model.unmerge_adapter()
    elif what == "set":
        model.set_adapter(chance.choice(names))
    elif what == "train":
        change_adapters(model, chance.randint(0, 99))
    elif what == "add" and len(names) < 4:
        name = next(n for n in ("w", "x", "y", "z") if n not in names)
        fan = model.peft_config[names[0]].fan_in_fan_out
        model.add_adapter(name, config(r=4, hybrid_r=chance.choice([0, 2]), fan_in_fan_out=fan))
    elif what == "delete" and len(names) > 1:
        merged = {name for m in model.modules() if isinstance(m, GraloraLinear) for name in m.merged_adapters}
        free = [name for name in names if name not in merged]
        if free:
            model.delete_adapter(chance.choice(free))
    elif what == "scale":
        layer_of(model).set_scale(chance.choice(names), 1.5)
    elif what == "off":
        with model.disable_adapter():  # which unmerges in forward
            model(rows(2, dtype=torch.float32).to(layer_of(model).base_layer.weight.dtype))


@each_dtype
@each_kind
@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_random_interleavings_end_with_the_bits_of_before(base: Any, hybrid_r: int, dtype: torch.dtype) -> None:
    for seed in range(10):
        chance = random.Random(seed)
        model = with_two(base, dtype, hybrid_r=hybrid_r, seed=seed)
        before = weights(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already|All adapters are|Adapter .* was active|Adapter cannot be set")
            for _ in range(15):
                step(model, chance)
                if not any(m.merged for m in model.modules() if isinstance(m, GraloraLinear)):
                    assert_as_before(model, before)
            model.unmerge_adapter()
        assert_as_before(model, before)


@each_dtype
@each_kind
def test_codes_of_plain_torch_lead_back_too(base: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices without kernels for codes; with the bits of a merge that keeps nothing."""
    monkeypatch.setattr(exact, "_has_kernel", lambda weight: False)
    for model, elements in ((with_two(base, dtype, hybrid_r=3), 200), (wide(dtype), 10_000)):
        monkeypatch.setattr(chunked, "ELEMENTS", elements)
        before = weights(model)
        for safe in (False, True):
            model.merge_adapter(adapter_names=["default"], safe_merge=safe)
            with pytest.warns(UserWarning, match="additionally"):
                model.merge_adapter(adapter_names=["other"], safe_merge=safe)
            layer, expected = layer_of(model), before["base_model.model.first.base_layer.weight"].clone()
            for operands in layer.kept_merge.operands:
                exact.add(expected, operands, layer.fan_in_fan_out)
            assert same_bits(layer.base_layer.weight.detach(), expected)
            model.unmerge_adapter()
            assert_as_before(model, before)


# ---------------------------------------------------------------- what a merge gives and keeps


@each_dtype
@each_kind
@pytest.mark.parametrize("safe", [False, True], ids=["in place", "safe"])
def test_the_merged_weight_has_the_bits_of_a_merge_that_keeps_nothing(
    base: Any, dtype: torch.dtype, safe: bool
) -> None:
    models = [with_two(base, dtype, hybrid_r=3) for _ in range(2)]
    for model, keeps in zip(models, (True, False), strict=True):
        for module in model.modules():
            if isinstance(module, GraloraLinear):
                module.exact_unmerge = keeps
                module.merge(safe_merge=safe, adapter_names=["default", "other"])
                assert (module.kept_merge is not None) == keeps
    for name, weight in weights(models[0]).items():
        assert same_bits(weight, weights(models[1])[name])


def test_merging_more_adapters_later_gives_the_bits_of_one_after_the_other() -> None:
    once, twice = wide(), wide()
    layer_of(once).merge(adapter_names=["other", "default"])
    before = weights(twice)
    layer_of(twice).merge(adapter_names=["other"])
    change_adapters(twice)
    with torch.no_grad():
        for name, parameter in layer_of(once).named_parameters():
            if name.startswith("gralora_") and "default" in name:
                layer_of(twice).get_parameter(name).copy_(parameter)
    with pytest.warns(UserWarning, match="additionally merging"):
        layer_of(twice).merge(adapter_names=["default"])
    assert same_bits(
        weights(once)["base_model.model.first.base_layer.weight"], layer_of(twice).base_layer.weight.detach()
    )
    twice.unmerge_adapter()
    assert_as_before(twice, before)


def tensors_of(kept: Kept) -> list[Tensor]:
    return [t for t in (kept.codes, kept.places, kept.values, kept.copy) if t is not None]


@each_dtype
def test_a_merge_keeps_at_most_eleven_tenths_of_a_byte_for_each_weight(dtype: torch.dtype) -> None:
    layer = layer_of(wide(dtype))
    layer.merge()
    kept = layer.kept_merge
    assert kept.copy is None
    assert sum(t.untyped_storage().nbytes() for t in tensors_of(kept)) <= 1.1 * layer.base_layer.weight.numel()


@each_dtype
def test_a_change_that_codes_cannot_hold_is_taken_off_by_a_copy(dtype: torch.dtype) -> None:
    model = wide(dtype)
    layer, before = layer_of(model), weights(model)
    with torch.no_grad():
        layer.gralora_B["default"].mul_(100)
    model.merge_adapter()
    kept = layer.kept_merge
    assert kept.codes is None and same_bits(kept.copy, before["base_model.model.first.base_layer.weight"])
    model.unmerge_adapter()
    assert_as_before(model, before)


@pytest.mark.parametrize("broken", ["nan", "inf"])
def test_a_broken_adapter_is_taken_off(broken: str) -> None:
    model = wide()
    before = weights(model)
    with torch.no_grad():
        layer_of(model).gralora_B["default"][0, 0] = float(broken)
    model.merge_adapter()
    assert not layer_of(model).base_layer.weight.isfinite().all()
    model.unmerge_adapter()
    assert_as_before(model, before)


def test_nothing_is_left_of_what_was_kept() -> None:
    model = wide()
    layer = layer_of(model)
    layer.merge()
    kept = [weakref.ref(layer.kept_merge), *(weakref.ref(t) for t in tensors_of(layer.kept_merge))]
    layer.unmerge()
    assert [each() for each in kept] == [None] * len(kept)


@pytest.mark.parametrize("threads", [(1, 2), (2, 1)])
def test_the_number_of_threads_may_change_between(threads: tuple[int, int]) -> None:
    model, before_threads = wide(), torch.get_num_threads()
    before = weights(model)
    try:
        torch.set_num_threads(threads[0])
        model.merge_adapter()
        torch.set_num_threads(threads[1])
        model.unmerge_adapter()
    finally:
        torch.set_num_threads(before_threads)
    assert_as_before(model, before)


def test_a_default_device_is_not_where_a_merge_keeps_its_notes() -> None:
    model = wide()
    before = weights(model)
    with torch.device("meta"):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_as_before(model, before)
