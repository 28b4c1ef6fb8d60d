# SPDX-License-Identifier: Apache-2.0
"""What may happen to a merged layer before it is unmerged: what spoils nothing, and what is told; and layers that keep nothing."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_helpers import assert_as_before, change_adapters, layer_of, weights, wide
from helpers import same_bits
from torch import Tensor, nn
from tuner_helpers import DEVICE, Mlp, adapted, llama, tokens

from gralora_ext import reference
from gralora_ext.tuner import GraloraLinear, accelerate, disable, enable, exact, restore


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
        (change, "was changed after adapters were merged"),
        (swap_rows, "was changed after"),
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
    general = {"A_general": o.A_general, "B_general": o.B_general}
    wide = {n: t.double() for n, t in {"A": o.A, "B": o.B, **general}.items() if t is not None}
    return reference.delta_weight(**wide, scaling=o.scaling)


def test_kept_knows_the_weight_that_it_has_made() -> None:
    layer = layer_of(wide())
    layer.merge()
    kept, weight = layer.kept_merge, layer.base_layer.weight
    assert kept.obstacle(weight) is None
    for row in range(0, 512, 37):
        changed = weight.detach().clone()
        bits = changed.view(torch.int16)
        bits[row, row // 2] ^= 1
        assert kept.obstacle(changed) == "was changed after adapters were merged into it, so they were subtracted"


def test_one_warning_tells_of_all_layers() -> None:
    model = adapted("fused", Mlp, torch.float32)
    model.merge_adapter()
    for module in model.modules():
        if isinstance(module, GraloraLinear):
            module.base_layer.weight.data.mul_(2)
    with pytest.warns(UserWarning, match=r"second was changed .*subtracted \(and so for 1 more\): it") as told:
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


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain torch"])
def test_a_merge_by_another_kind_of_processor_is_told_and_taken_off_but_for_rounding(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(exact, "_has_kernel", lambda weight: False)
    model = wide(torch.float32)
    layer, before = layer_of(model), weights(model)
    model.merge_adapter()
    assert layer.kept_merge.copy is None
    layer.kept_merge.operands[0].A.mul_(1 + 2**-20)  # its sums differ in their last bits
    with pytest.warns(UserWarning, match="first was merged on another kind of processor"):
        model.unmerge_adapter()
    assert not layer.merged and layer.kept_merge is None
    after = layer.base_layer.weight.detach()
    torch.testing.assert_close(after, before["base_model.model.first.base_layer.weight"], rtol=1e-5, atol=1e-5)


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
