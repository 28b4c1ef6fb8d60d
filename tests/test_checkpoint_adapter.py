# SPDX-License-Identifier: Apache-2.0
"""Adapters' folders are read as PEFT reads them, and refused where they are not what they say."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import gpt2, gralora, llama, lora, save_adapter, save_base
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from gralora_ext import ops
from gralora_ext.checkpoint import adapter_config
from gralora_ext.checkpoint.adapter import Adapter
from gralora_ext.checkpoint.adapter_config import values_of_layers
from gralora_ext.program.errors import FileError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), llama())


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_layers_have_the_delta_of_the_layers_in_a_model(base, tmp_path):
    deltas = {}

    def keep(model):
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                deltas[name] = module.get_delta_weight("default").clone()

    config = gralora(
        hybrid_r=2,
        rank_pattern={"q_proj": 16},
        alpha_pattern={"layers.0.mlp.up_proj": 3},
        k_pattern={"v_proj": 4},
        use_rslora=True,
    )
    save_adapter(tmp_path / "a", base, config, change=keep)
    with Adapter(tmp_path / "a") as adapter:
        assert set(adapter.layers) == set(deltas) and not adapter.whole
        for name, layer in adapter.layers.items():
            assert torch.equal(ops.delta_weight(**layer.stored(), scaling=layer.scaling), deltas[name]), name
        assert adapter.layers["model.layers.0.self_attn.q_proj"].r == 16
        assert adapter.layers["model.layers.0.self_attn.v_proj"].k == 4
        assert adapter.layers["model.layers.0.mlp.up_proj"].scaling == 3 / math.sqrt(10)


def test_a_lora_is_a_gralora_of_one_block(base, tmp_path):
    deltas = {}

    def keep(model):
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                deltas[name] = module.get_delta_weight("default").clone()

    save_adapter(tmp_path / "a", base, lora(rank_pattern={"q_proj": 3}, use_rslora=True), change=keep)
    with Adapter(tmp_path / "a") as adapter:
        assert set(adapter.layers) == set(deltas)
        for name, layer in adapter.layers.items():
            got = ops.delta_weight(**layer.stored(), scaling=layer.scaling)
            torch.testing.assert_close(got, deltas[name], rtol=1e-5, atol=1e-6)


def test_a_switch_that_is_a_number_is_on_as_in_peft(base, tmp_path):
    save_adapter(tmp_path / "a", base, lora(r=4, lora_alpha=6))
    change_config(tmp_path / "a", use_rslora=1)
    with Adapter(tmp_path / "a") as adapter:
        assert {layer.scaling for layer in adapter.layers.values()} == {3.0}


def test_what_is_trained_whole_has_the_names_of_the_parameters(tmp_path):
    base = save_base(tmp_path / "base", gpt2())
    config = gralora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all", modules_to_save=["lm_head"])
    save_adapter(tmp_path / "a", base, config)
    with Adapter(tmp_path / "a") as adapter:
        assert adapter.fan_in_fan_out
        assert {"lm_head.weight", "transformer.h.0.attn.c_attn.bias", "transformer.ln_f.bias"} <= set(adapter.whole)
        assert set(adapter.layers) == {"transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}


CONFIGS = {
    "another kind": ({"peft_type": "IA3"}, "expected GRALORA or LORA"),
    "of the method's repository": ({"gralora_alpha": 8}, "import-official"),
    "another r": ({"r": 6}, "r is 6"),
    "another k": ({"gralora_k": 4}, "gralora_k is 4"),
    "another h": ({"hybrid_r": 4}, "hybrid_r is 4"),
    "alpha a text": ({"alpha": "8"}, "alpha: expected a number"),
    "alpha a huge integer": ({"alpha": 10**400}, "alpha: expected a number"),
    "a pattern that is no expression": ({"alpha_pattern": {"(": 1}}, "regular expression"),
    "a pattern that PEFT cannot put behind a prefix": ({"alpha_pattern": {"(?i)Q": 1}}, "regular expression"),
    "k with endless digits": ({"gralora_k": "9" * 5000 + " (needs gralora_ext: k_pattern)"}, "gralora_k is"),
    "a pattern that is a list": ({"rank_pattern": [1]}, "rank_pattern"),
    "trained tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused(base, tmp_path, name):
    save_adapter(tmp_path / "a", base, gralora())
    fields, message = CONFIGS[name]
    change_config(tmp_path / "a", **fields)
    with pytest.raises(FileError, match=message):
        Adapter(tmp_path / "a")


def test_patterns_are_matched_as_peft_matches_them():
    keys = [
        "q_proj",
        "layers.1.mlp.up",
        r"layers\.[02]\.mlp\.(up|down)_proj",
        "^model.layers.1",
        r"^model.*v_proj",
        "odd)(_k",
    ]
    layers = [
        f"model.layers.{n}.{end}" for n in range(3) for end in ("q_proj", "mlp.up_proj", "mlp.down_proj", "v_proj")
    ]
    layers += ["model.layers.1", "odd_k", "v_proj"]
    pattern = {key: number for number, key in enumerate(keys, 1)}
    expected = {layer: pattern.get(get_pattern_key(pattern.keys(), layer)) for layer in layers}
    found = values_of_layers(Path("config"), "rank_pattern", pattern, layers)
    assert found == {layer: value for layer, value in expected.items() if value is not None}
    assert set(found.values()) == set(pattern.values()) - {2}


@pytest.mark.parametrize(
    "key", [r"([\w.]+)+!", "(){4000000000}!", "(x?){1000}" * 100_000], ids=["years", "memory", "long"]
)
def test_patterns_that_take_years_or_all_memory_are_refused(monkeypatch, key):
    monkeypatch.setattr(adapter_config, "_SECONDS", 1)
    with pytest.raises(FileError, match="rank_pattern: its keys take more than 1 s or 512 MiB to match"):
        values_of_layers(Path("config"), "rank_pattern", {key: 4}, ["model.layers.0.self_attn.q_proj"])


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "target_parameters"])
def test_lora_that_is_not_plain_is_refused(base, tmp_path, field):
    save_adapter(tmp_path / "a", base, lora())
    change_config(tmp_path / "a", **{field: ["x"] if field == "target_parameters" else True})
    with pytest.raises(FileError, match=field):
        Adapter(tmp_path / "a")


def test_lora_that_changed_its_base_is_refused(base, tmp_path):
    save_adapter(tmp_path / "a", base, lora())
    change_config(tmp_path / "a", init_lora_weights="pissa_niter_4")
    with pytest.raises(FileError, match="pissa"):
        Adapter(tmp_path / "a")


def test_tensors_that_do_not_fit_each_other_are_refused(base, tmp_path):
    folder = save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj"]))
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    name = next(key for key in whole if key.endswith("gralora_A"))
    for changed in (
        {key: value for key, value in whole.items() if key != name},
        {**whole, name: whole[name][:1].contiguous()},
        {**whole, name: whole[name].to(torch.int32)},
        {**whole, "lm_head.weight": torch.ones(1)},
        {**whole, "base_model.model.lm_head.lora_embedding_A": torch.ones(1)},
        {},
    ):
        save_file(changed, file)
        with pytest.raises(FileError, match="adapter_model.safetensors"):
            Adapter(folder)


def test_a_folder_with_a_pickle_is_refused_with_the_way_out(base, tmp_path):
    folder = save_adapter(tmp_path / "a", base, gralora())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileError, match="save_pretrained"):
        Adapter(folder)
    with pytest.raises(FileError, match="is not a folder"):
        Adapter(tmp_path / "nothing")
