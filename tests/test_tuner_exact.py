# SPDX-License-Identifier: Apache-2.0
"""Unmerging gives back the bits of before the first merge, whatever happened between."""

from __future__ import annotations

import copy
import io
import random
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NAMES, same_bits
from torch import Tensor, nn
from tuner_helpers import DEVICE, Conv1DMlp, Mlp, adapted, config, llama, rows, tokens

from gralora_ext.tuner import GraloraLinear, accelerate, chunked, disable, enable, exact, restore
from gralora_ext.tuner.exact import AFTER, Kept

BASES = [Mlp, Conv1DMlp]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
each_kind = pytest.mark.parametrize("base", BASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


class Wide(nn.Module):
    """A layer of 256 by 512, which has room for exceptions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def with_two(base: Any, dtype: torch.dtype, **fields: Any) -> Any:
    model = adapted("fused", base, dtype, **fields)
    targets = {"target_modules": ["first"]} if base is Wide else {}
    other = config(r=8, gralora_k=4, hybrid_r=2, fan_in_fan_out=base is Conv1DMlp, **targets)
    model.add_adapter("other", other)
    return model.to(DEVICE)


def wide(dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Any:
    """A layer whose merges are kept as codes."""
    return with_two(Wide, dtype, target_modules=["first"], **fields)


def layer_of(model: Any) -> Any:
    return model.base_model.model.first


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of all base weights."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}


def assert_as_before(model: Any, before: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in before:
            assert same_bits(parameter.detach(), before[name]), name
    for module in model.modules():
        if isinstance(module, GraloraLinear):
            assert not module.merged and module.kept_merge is None and module.journal is None


def change_adapters(model: Any, seed: int = 0) -> None:
    """What training does to them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gralora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


# ---------------------------------------------------------------- cycles


@each_dtype
@each_kind
@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_a_thousand_cycles_change_no_bit(base: Any, hybrid_r: int, dtype: torch.dtype) -> None:
    model = with_two(base, dtype, hybrid_r=hybrid_r)
    before = weights(model)
    for cycle in range(1000):
        names = (["default"], ["other"], ["default", "other"], ["other", "default"])[cycle % 4]
        model.merge_adapter(adapter_names=names)
        model.unmerge_adapter()
    assert_as_before(model, before)


@each_dtype
def test_codes_lead_back_for_a_thousand_cycles(dtype: torch.dtype) -> None:
    model = wide(dtype)
    before = weights(model)
    for _ in range(1000):
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
    for seed in range(20):
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
    monkeypatch.setattr(chunked, "ELEMENTS", 200)
    for model in (with_two(base, dtype, hybrid_r=3), wide(dtype)):
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


# ---------------------------------------------------------------- what happens meanwhile


def test_training_rescaling_and_deleting_the_merged_adapter_spoil_nothing() -> None:
    model = wide()
    before = weights(model)
    model.merge_adapter()
    change_adapters(model)
    layer_of(model).set_scale("default", 3.0)
    layer_of(model).delete_adapter("default")  # the layer's own method does not ask whether it is merged
    model.unmerge_adapter()
    assert_as_before(model, before)


def change(weight: nn.Parameter) -> None:
    weight.data[3, 5] += 1


def swap_rows(weight: nn.Parameter) -> None:
    weight.data[[1, 2]] = weight.data[[2, 1]].clone()


def cast(weight: nn.Parameter) -> None:
    weight.data = weight.data.float()


def transpose(weight: nn.Parameter) -> None:
    weight.data = weight.data.t().contiguous().t()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change, "was changed since they were merged"),
        (swap_rows, "was changed since"),
        (cast, r"is torch\.float32 on .* and was torch\.bfloat16 on"),
        (transpose, r"is .* and strides \[1, 512\] and was"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer"])
def test_a_weight_that_is_no_longer_the_merged_one_is_told_and_subtracted_from(
    spoil: Any, words: str, whole: bool
) -> None:
    model = wide()
    layer = layer_of(model)
    model.merge_adapter()
    change_adapters(model)  # what is subtracted is what was added
    spoil(layer.base_layer.weight)
    merged = layer.base_layer.weight.detach().double()
    delta = sum(
        (layer_delta(o) for o in layer.kept_merge.operands), torch.zeros((), dtype=torch.float64, device=DEVICE)
    )
    with pytest.warns(UserWarning, match=f"first {words}.*, so they were subtracted"):
        (model.unmerge_adapter if whole else layer.unmerge)()
    assert not layer.merged and layer.kept_merge is None
    torch.testing.assert_close(layer.base_layer.weight.detach().double(), merged - delta, rtol=2**-8, atol=1e-3)


def layer_delta(o: Any) -> Tensor:
    from gralora_ext import reference

    general = {"A_general": o.A_general, "B_general": o.B_general}
    wide = {n: t.double() for n, t in {"A": o.A, "B": o.B, **general}.items() if t is not None}
    return reference.delta_weight(**wide, scaling=o.scaling)


def test_one_warning_tells_of_all_layers() -> None:
    model = adapted("fused", Mlp, torch.float32)
    model.merge_adapter()
    for module in model.modules():
        if isinstance(module, GraloraLinear):
            module.base_layer.weight.data.mul_(2)
    with pytest.warns(UserWarning, match=r"second was changed .* \(as were 1 others\), so") as told:
        model.unmerge_adapter()
    assert len(told) == 1


def test_a_changed_weight_takes_more_adapters_and_gives_them_all_back() -> None:
    model = wide(torch.float32)
    layer = layer_of(model)
    model.merge_adapter(adapter_names=["default"])
    layer.base_layer.weight.data.add_(1.0)
    before = layer.base_layer.weight.detach().double() - layer_delta(layer.kept_merge.operands[0])
    with pytest.warns(UserWarning, match="additionally"):
        model.merge_adapter(adapter_names=["other"])
    with pytest.warns(UserWarning, match="so they were subtracted"):
        model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight.detach().double(), before, rtol=1e-5, atol=1e-5)


def test_a_copied_and_a_stored_model_unmerge_too() -> None:
    model = wide()
    before = weights(model)
    model.merge_adapter()
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    others = [copy.deepcopy(model), torch.load(stored, weights_only=False)]
    for each in (*others, model):
        each.unmerge_adapter()
        assert_as_before(each, before)


def test_checkpoints_hold_nothing_of_it(tmp_path: Path) -> None:
    model = wide()
    names = [list(model.state_dict())]
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    names.append(list(model.state_dict()))
    model.save_pretrained(tmp_path / "after")
    assert names[0] == names[1]
    files = [
        {f.name: f.read_bytes() for f in (tmp_path / each).rglob("*") if f.is_file()} for each in ("before", "after")
    ]
    assert files[0] == files[1]


def test_a_merged_model_compiles() -> None:
    model = wide(torch.float32)
    model.merge_adapter()
    x = torch.randn(3, 256, device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_layers_that_share_a_weight_are_unmerged_in_the_right_order() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 256)
            self.second.weight = self.first.weight

    model = adapted("fused", Tied, torch.bfloat16)
    before = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
        model.unmerge_adapter()
    assert_as_before(model, before)


def test_evaluation_of_disabled_adapters_gives_the_bits_of_before() -> None:
    model = adapted("fused", llama, torch.bfloat16, target_modules=["q_proj", "down_proj"]).eval()
    before = weights(model)
    with model.disable_adapter():
        expected = model(input_ids=tokens(2, 6)).logits
    model.merge_adapter()
    with model.disable_adapter():
        assert same_bits(model(input_ids=tokens(2, 6)).logits.detach(), expected.detach())
    assert_as_before(model, before)


# ---------------------------------------------------------------- switched off


def test_without_exact_unmerge_nothing_is_kept() -> None:
    with enable(exact_unmerge=False):
        model = adapted("stock", Mlp, torch.float32)
    layer = layer_of(model)
    assert isinstance(layer, GraloraLinear) and not layer.exact_unmerge
    before = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    assert layer.kept_merge is None and layer.journal is None
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight.detach(), before, rtol=1e-5, atol=1e-6)
    assert layer_of(adapted("fused", Mlp)).exact_unmerge


def test_disable_forgets_the_setting() -> None:
    enable(exact_unmerge=False)
    disable()
    assert layer_of(adapted("fused")).exact_unmerge


def test_a_layer_may_be_switched_off_while_it_is_merged() -> None:
    model = wide()
    layer, before = layer_of(model), weights(model)
    layer.merge(adapter_names=["default"])
    layer.exact_unmerge = False
    with pytest.warns(UserWarning, match="additionally"):
        layer.merge(adapter_names=["other"])
    layer.unmerge()
    assert_as_before(model, before)


def test_what_was_merged_without_codes_is_subtracted_and_the_rest_taken_off() -> None:
    model = wide(torch.float32)
    layer = layer_of(model)
    before = layer.base_layer.weight.detach().clone()
    layer.exact_unmerge = False
    layer.merge(adapter_names=["default"])
    layer.exact_unmerge = True
    with pytest.warns(UserWarning, match="additionally"):
        layer.merge(adapter_names=["other"])
    assert [o.name for o in layer.kept_merge.operands] == ["other"]
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight.detach(), before, rtol=1e-5, atol=1e-6)


def test_restore_leaves_a_merged_layer_by_name() -> None:
    model = wide()
    before = weights(model)
    model.merge_adapter()
    report = restore(model)
    assert report.converted == 0
    assert [name for name, _ in report.skipped] == ["base_model.model.first"]
    assert "takes off bit for bit, and PEFT's layer would not: unmerge them first" in report.skipped[0][1]
    accelerate(model)
    model.unmerge_adapter()
    assert_as_before(model, before)
    assert restore(model).converted == 1


def test_kept_knows_the_weight_that_it_has_made() -> None:
    layer = layer_of(wide())
    layer.merge()
    kept, weight = layer.kept_merge, layer.base_layer.weight
    assert kept.obstacle(weight) is None
    seen = {int(kept.facts[AFTER])}
    for row in range(0, 512, 37):
        changed = weight.detach().clone()
        bits = changed.view(torch.int16)
        bits[row, row // 2] ^= 1
        assert kept.obstacle(changed) == "was changed since they were merged"
        seen.add(kept._checksums(changed)[1])
    assert len(seen) == 15
