# SPDX-License-Identifier: Apache-2.0
"""Models whose weights accelerate keeps in other memory or on disk: inference, merging, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers import same_bits
from tuner_helpers import DEVICE, Mlp, adapted, config, llama, needs_new_peft, tokens

from gralora_ext.tuner import enable

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the device of execution is the CPU here")


def offload(model: Any, where: str, folder: Path) -> None:
    if where == "memory":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())


@needs_new_peft
def test_offloaded_adapters_are_not_added_up_in_vain() -> None:
    model = adapted("fused", llama, target_modules=["q_proj"]).eval()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="q_proj: the weights of adapter 'default' are on meta: load them first"):
        model.add_weighted_adapter(["default"], [2.0], "sum", "cat")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_offloaded_adapters_give_the_bits_of_those_in_memory(where: str, hybrid_r: int, tmp_path: Path) -> None:
    model = adapted("fused", llama, hybrid_r=hybrid_r, target_modules=["q_proj", "down_proj"]).eval()
    model.add_adapter("other", config(r=4, target_modules=["q_proj"]))
    ids, expected = tokens(2, 6), {}
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            expected[name] = model(input_ids=ids).logits
        offload(model, where, tmp_path)
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            assert same_bits(model(input_ids=ids).logits, expected[name])
    assert all(p.is_meta for p in model.parameters()), "nothing stays in memory"


@needs_new_peft
def test_rows_of_a_batch_may_have_offloaded_adapters(tmp_path: Path) -> None:
    model = adapted("fused", llama, target_modules=["q_proj"]).eval()
    model.add_adapter("other", config(r=4, target_modules=["q_proj"]))
    batch: dict[str, Any] = {"input_ids": tokens(3, 6), "adapter_names": ["other", "__base__", "default"]}
    with torch.no_grad():
        expected = model(**batch).logits
        offload(model, "disk", tmp_path)
        assert same_bits(model(**batch).logits, expected)


def test_training_of_an_offloaded_adapter_is_refused(tmp_path: Path) -> None:
    """Its gradient would go into a tensor that is thrown away."""
    model = adapted("fused", Mlp)
    offload(model, "memory", tmp_path)
    with pytest.raises(ValueError, match="the input is on cpu, but adapter 'default' is on meta"):
        model(torch.randn(3, model.base_model.model.first.in_features, dtype=torch.float64))


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("how", ["set_adapter", "disable_adapter", "add_adapter"])
@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
def test_whatever_unmerges_an_offloaded_model_changes_the_weights_that_are_kept(
    where: str, how: str, tmp_path: Path
) -> None:
    """PEFT unmerges layers by themselves, with their weights on meta."""
    model = adapted("fused", llama, torch.float32, target_modules=["q_proj"]).eval()
    ids, fields = tokens(2, 6), {"target_modules": ["q_proj"]}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
        offload(model, where, tmp_path)
        model.merge_adapter()
        if how == "disable_adapter":
            with model.disable_adapter():
                assert same_bits(model(input_ids=ids).logits, without)
        elif how == "add_adapter":
            with enable():
                model.add_adapter("other", config(**fields))
        model.set_adapter("default")
        assert same_bits(model(input_ids=ids).logits, expected)


def test_a_weight_that_went_to_meta_is_not_said_to_be_unmerged() -> None:
    model = adapted("fused", Mlp)
    model.merge_adapter()
    layer = model.base_model.model.first
    layer.base_layer.to("meta")
    with pytest.raises(ValueError, match="the base weight is on meta, but adapter 'default' is on cpu"):
        layer.unmerge()
    assert layer.merged
