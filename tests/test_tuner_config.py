# SPDX-License-Identifier: Apache-2.0
"""The configuration: LoraConfig's fields in GraLoRA, and what is written of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from config_helpers import FIELDS, USED, built, layers
from helpers import same_bits
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from tuner_helpers import Mlp, adapted, gpt2, llama, needs_new_peft, rows, tokens

from gralora_ext import GraloraConfig, reference
from gralora_ext.tuner import disable, enable, init
from gralora_ext.tuner.patterns import choose_k

pytestmark = needs_new_peft


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    with enable():
        yield


def assert_layer_is_the_reference(layer: Any, scaling: float) -> None:
    x = rows(5, width=layer.in_features)
    general = [getattr(layer, f"gralora_{name}_general")["default"] for name in "AB"]
    hybrid = (
        {f"{name}_general": m.weight for name, m in zip("AB", general, strict=True)}
        if layer.hybrid_r["default"]
        else {}
    )
    A, B = layer.gralora_A["default"], layer.gralora_B["default"]
    expected = reference.gralora(x, layer.base_layer(x), A, B, scaling=scaling, **hybrid)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- what the fields do


def test_patterns_give_each_layer_its_own_r_alpha_and_k() -> None:
    model = built(rank_pattern={"first": 8}, alpha_pattern={"sec.*": 6}, k_pattern={"^first$": 4}, hybrid_r=2)
    first, second = layers(model)["first"], layers(model)["second"]
    assert (first.r["default"], first.alpha["default"], first.gralora_k["default"]) == (8, 24, 4)
    assert (second.r["default"], second.alpha["default"], second.gralora_k["default"]) == (12, 6, 2)
    assert first.gralora_A["default"].shape == (4, first.in_features // 4, 8)
    assert_layer_is_the_reference(first, 24 / 10)
    assert_layer_is_the_reference(second, 6 / 14)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    model = built(use_rslora=True, hybrid_r=4, rank_pattern={"second": 6})
    assert_layer_is_the_reference(layers(model)["first"], 24 / 16**0.5)
    assert_layer_is_the_reference(layers(model)["second"], 24 / 10**0.5)


def test_a_second_adapter_has_its_own_fields() -> None:
    model = built()
    model.add_adapter("other", GraloraConfig(**{**FIELDS, "use_rslora": True, "rank_pattern": {"first": 4}}))
    layer = layers(model)["first"]
    assert (layer.r, layer.scaling) == ({"default": 12, "other": 4}, {"default": 2.0, "other": 12.0})


@pytest.mark.parametrize(
    ("r", "N", "M", "k"),
    [
        *((8, 64, 64, 1), (16, 64, 64, 2), (32, 64, 64, 2), (64, 64, 64, 4), (128, 64, 64, 4), (512, 64, 64, 8)),
        *((9, 64, 64, 1), (32, 33, 64, 1), (128, 64, 66, 2), (40, 64, 64, 2), (20, 64, 64, 2)),
    ],
)
def test_auto_takes_the_divisor_that_is_nearest_to_the_papers_setting(r: int, N: int, M: int, k: int) -> None:
    possible = [c for c in (1, 2, 4, 8) if r % c == N % c == M % c == 0]
    assert choose_k(r, N, M) == k == min(possible, key=lambda c: (abs(r / c**2 - 8), c))


def test_auto_is_replaced_by_what_was_chosen_and_a_reload_gives_the_same(tmp_path: Path) -> None:
    model = built(llama, r=32, gralora_k="auto", rank_pattern={"q_proj": 8}, target_modules="all-linear")
    chosen = {name: layer.gralora_k["default"] for name, layer in layers(model).items()}
    assert set(chosen.values()) == {1, 2}
    stored = model.peft_config["default"]
    assert stored.gralora_k == 2 and all(re_key.startswith("^") for re_key in stored.k_pattern)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert {name: layer.gralora_k["default"] for name, layer in layers(again).items()} == chosen
    assert same_bits(again(tokens(2, 6)).logits, model(tokens(2, 6)).logits)


@pytest.mark.parametrize("k_pattern", [{}, {"down_proj": 2}])
def test_auto_stores_a_k_that_divides_r_though_most_layers_have_another_r(k_pattern: Any, tmp_path: Path) -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    patterns = {"rank_pattern": {"|".join(attention): 64}, "k_pattern": k_pattern}
    model = built(llama, r=2, gralora_k="auto", target_modules=[*attention, "down_proj"], **patterns)
    chosen = {name: layer.gralora_k["default"] for name, layer in layers(model).items()}
    assert sorted(chosen.values()) == [k_pattern.get("down_proj", 1)] * 2 + [4] * 8
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert {name: layer.gralora_k["default"] for name, layer in layers(again).items()} == chosen


def test_auto_that_chooses_the_same_everywhere_is_a_file_that_stock_peft_reads(tmp_path: Path) -> None:
    built(r=12, gralora_k="auto").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["gralora_k"] == 1
    disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(PeftConfig.from_pretrained(tmp_path)) is peft.GraloraConfig


def test_gaussian_begins_with_a_normal_A_and_zeros() -> None:
    layer = layers(built(llama, r=16, hybrid_r=8, init_weights="gaussian", target_modules=["gate_proj"]))
    for one in layer.values():
        for tensor, deviation in ((one.gralora_A["default"], 1 / 16), (one.gralora_A_general["default"].weight, 1 / 8)):
            assert abs(tensor.std().item() * 1 / deviation - 1) < 0.2
        assert not one.gralora_B["default"].any() and not one.gralora_B_general["default"].weight.any()


def test_an_adapter_in_float8_begins_too() -> None:
    """PEFT puts it in the dtype of such a base, in which torch draws no numbers."""
    layer = adapted("fused", Mlp, torch.float32).base_model.model.first
    for name, parameter in layer.named_parameters():
        if "gralora" in name:
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    layer.gralora_B["default"].data.zero_()
    init.finish(layer, "default", GraloraConfig(init_weights="gaussian"))
    A = layer.gralora_A["default"].float()
    assert A.isfinite().all() and abs(A.std().item() * layer.r["default"] - 1) < 0.2


@pytest.mark.parametrize("k", [1, 2])
def test_orthogonal_begins_at_random_and_changes_nothing(k: int) -> None:
    model = built(r=12, gralora_k=k, hybrid_r=4, init_weights="orthogonal")
    for layer in layers(model).values():
        assert layer.gralora_A["default"].norm() > 0.1 and layer.gralora_B["default"].norm() > 0.1
        assert layer.get_delta_weight("default").abs().max() < 1e-7  # made in float32, as LoRA's


@pytest.mark.parametrize(("fields", "name"), [({"r": 6}, "r / gralora_k"), ({"hybrid_r": 3}, "hybrid_r")])
def test_orthogonal_needs_even_ranks(fields: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"needs an even {name}, got 3"):
        built(init_weights="orthogonal", **fields)


@pytest.mark.parametrize("exclude", [["second"], "sec.*"])
def test_excluded_modules_are_left_alone(exclude: Any) -> None:
    assert list(layers(built(exclude_modules=exclude))) == ["first"]


def test_trained_tokens_are_merged() -> None:
    model = built(llama, trainable_token_indices=[3, 5], target_modules=["q_proj"]).eval()
    with torch.no_grad():
        model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"] += 1
    batch = tokens(2, 8)
    batch[0, :2] = torch.tensor([3, 5])
    with torch.no_grad():
        expected = model(input_ids=batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=batch).logits, expected)


def test_trained_tokens_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = built(llama, trainable_token_indices=[3, 5], target_modules=["q_proj"])
    batch = tokens(2, 8)
    batch[0, :2] = torch.tensor([3, 5])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    embeddings = model.get_input_embeddings()
    changed = (
        (embeddings.token_adapter.get_merged_weights(["default"]) != embeddings.original_module.weight)
        .any(1)
        .nonzero()
        .flatten()
    )
    assert changed.tolist() == [3, 5]
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert same_bits(again(batch).logits, model(batch).logits)


def test_modules_to_save_that_are_tied_stay_tied() -> None:
    def tied() -> Any:
        model = llama()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    model = built(tied, modules_to_save=["embed_tokens"], target_modules=["q_proj"], ensure_weight_tying=True)
    inner = model.base_model.model
    assert inner.lm_head.weight.data_ptr() == inner.model.embed_tokens.weight.data_ptr()


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("base", [Mlp, gpt2])
def test_at_their_defaults_the_files_are_pefts(base: Any, tmp_path: Path) -> None:
    fields = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if base is gpt2 else {}
    for config in (GraloraConfig, peft.GraloraConfig):
        built(base, config=config, **fields).save_pretrained(tmp_path / config.__module__)
    ours, theirs = (tmp_path / c.__module__ for c in (GraloraConfig, peft.GraloraConfig))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(PeftConfig.from_pretrained(ours)) is peft.GraloraConfig


@pytest.mark.parametrize("field", USED)
def test_a_field_in_use_is_written_and_read(field: str, tmp_path: Path) -> None:
    config = GraloraConfig(**{**FIELDS, field: USED[field]})
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is GraloraConfig and again == config and again.fields_in_use() == [field]
    assert GraloraConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    "field", ["rank_pattern", "alpha_pattern", "k_pattern", "use_rslora", "trainable_token_indices"]
)
def test_stock_peft_fails_on_a_file_whose_numbers_it_would_change(field: str, tmp_path: Path) -> None:
    GraloraConfig(**{**FIELDS, field: USED[field]}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["gralora_k"]
    assert written == f"2 (needs gralora_ext: {field})"
    disable()
    with pytest.raises(TypeError), pytest.warns(UserWarning, match=field):
        PeftConfig.from_pretrained(tmp_path)


def test_auto_classes_read_the_fields(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, GraloraConfig(**{**FIELDS, "target_modules": ["q_proj"], "use_rslora": True}))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert same_bits(again(tokens(2, 5)).logits, model(tokens(2, 5)).logits)
