# SPDX-License-Identifier: Apache-2.0
"""A checkpoint written by one tuner is read by the other, without a warning and with the same bytes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import same_bits
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel
from tuner_helpers import DEVICE, adapted, config, fused_layers, gpt2, llama, stock_layers, tokens

from gralora_ext.tuner import enable

FIELDS: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "up_proj"], "hybrid_r": 2, "gralora_k": 4, "gralora_dropout": 0.1},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "bias": "all"},
]
DIRECTIONS = [("stock", "fused"), ("fused", "stock"), ("fused", "fused")]


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Deprecations are between PEFT and transformers, and come without us too.
        warnings.simplefilter("ignore", FutureWarning)
        yield


def using(tuner: str) -> Any:
    return enable() if tuner == "fused" else nullcontext()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], PreTrainedModel]:
    """Reads the language model from a folder, as users do (PEFT warns about a base model that it cannot look up)."""
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return lambda: LlamaForCausalLM.from_pretrained(folder).to(DEVICE, torch.float64)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(2, 6)).logits


def layers_of(tuner: str, model: nn.Module) -> list[str]:
    return (fused_layers if tuner == "fused" else stock_layers)(model)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
def test_saved_adapter_loads_in_the_other(
    writer: str, reader: str, fields: dict[str, Any], safe: bool, base: Any, tmp_path: Path
) -> None:
    written = adapted(writer, base, **fields)
    written.save_pretrained(tmp_path, safe_serialization=safe)
    with using(reader):
        read = PeftModel.from_pretrained(base(), tmp_path)
    assert layers_of(reader, read) == layers_of(writer, written) != []
    torch.testing.assert_close(logits(read), logits(written), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_both_tuners_write_the_same_files(fields: dict[str, Any], base: Any, tmp_path: Path) -> None:
    for tuner in ("stock", "fused"):
        adapted(tuner, base, **fields).save_pretrained(tmp_path / tuner)
    configs = [json.loads((tmp_path / tuner / "adapter_config.json").read_text()) for tuner in ("stock", "fused")]
    stock, fused = (load_file(tmp_path / tuner / "adapter_model.safetensors") for tuner in ("stock", "fused"))
    assert configs[0] == configs[1] and configs[0]["peft_type"] == "GRALORA"
    assert list(stock) == list(fused) and all(same_bits(stock[key], fused[key]) for key in stock)


def test_conv1d_adapter_loads_in_stock_peft(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base")

    def base() -> PreTrainedModel:
        return GPT2LMHeadModel.from_pretrained(tmp_path / "base").to(DEVICE, torch.float64)

    fused = adapted("fused", base, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    fused.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(stock), logits(fused), rtol=1e-11, atol=1e-11)


def test_loading_onto_meta_gives_the_same_model(base: Any, tmp_path: Path) -> None:
    written = adapted("fused", base, **FIELDS[1])
    written.save_pretrained(tmp_path)
    with enable():
        read = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(read), logits(written))


@pytest.mark.parametrize(("source", "target"), DIRECTIONS)
def test_adapter_state_dict_moves_between_them(source: str, target: str, base: Any) -> None:
    model = adapted(source, base, hybrid_r=2, target_modules="all-linear")
    other = adapted(target, base, hybrid_r=2, target_modules="all-linear", init_weights=True)
    state = get_peft_model_state_dict(model)
    assert state and all("gralora_" in key for key in state)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-11, atol=1e-11)
    other.load_state_dict(model.state_dict())


def test_second_adapter_is_loaded_as_fused_layers(base: Any, tmp_path: Path) -> None:
    other = adapted("stock", base, target_modules=["up_proj"], r=6, gralora_k=1)
    other.save_pretrained(tmp_path)
    model = adapted("fused", base, target_modules=["q_proj"])
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert len(fused_layers(model)) == 4 and not stock_layers(model)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-11, atol=1e-11)


def test_transformers_own_adapter_interface_gets_fused_layers(base: Any, tmp_path: Path) -> None:
    adapter = adapted("stock", base, target_modules=["q_proj"])
    adapter.save_pretrained(tmp_path)
    model = base()
    with enable():
        model.load_adapter(tmp_path)
    assert len(fused_layers(model)) == 2
    torch.testing.assert_close(logits(model), logits(adapter), rtol=1e-11, atol=1e-11)


def test_config_round_trip_is_pefts(tmp_path: Path) -> None:
    written = config(target_modules=["first"], gralora_k=3, hybrid_r=1, gralora_dropout=0.25, bias="gralora_only")
    written.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert type(read) is peft.GraloraConfig and read == written
