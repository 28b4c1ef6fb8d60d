# SPDX-License-Identifier: Apache-2.0
"""Tiny models and adapters in folders, for the tests of ``gralora_ext.checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import gralora_ext
from gralora_ext import GraloraConfig

HIDDEN = 32
LLAMA = {
    "vocab_size": 96,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**fields: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, "tie_word_embeddings": False, **fields}))


def gpt2(**fields: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=96, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, **fields)
    )


def save_base(folder: Path, model: torch.nn.Module, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """The model in the format of transformers, with a file of a tokenizer's beside it."""
    model.to(dtype).save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    return folder


def gralora(**fields: Any) -> GraloraConfig:
    """Random from the start, so that the adapter changes the output at once."""
    defaults = {"r": 8, "alpha": 12, "gralora_k": 2, "target_modules": PROJECTIONS, "init_weights": False}
    with gralora_ext.enable():
        return GraloraConfig(**{**defaults, **fields})


def lora(**fields: Any) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, "init_lora_weights": False}
    return LoraConfig(**{**defaults, **fields})


def save_adapter(folder: Path, base: Path, config: Any, seed: int = 1, change: Any = None) -> Path:
    """A new adapter for the base in a folder, with our layers; ``change(model)`` before it is saved."""
    torch.manual_seed(seed)
    with gralora_ext.enable():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        if change is not None:
            with torch.no_grad():
                change(model)
        model.save_pretrained(folder)
    return folder


def merged_in_memory(base: Path, *adapters: Path, **how: Any) -> torch.nn.Module:
    """The base with all adapters merged one after the other, by our layers in a model."""
    with gralora_ext.enable():
        model: Any = AutoModelForCausalLM.from_pretrained(base, **how)
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


def assert_same_weights(got: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Bit for bit, and in the same dtype."""
    got_state, expected_state = got.state_dict(), expected.state_dict()
    assert set(got_state) == set(expected_state)
    for name, tensor in expected_state.items():
        assert got_state[name].dtype == tensor.dtype, name
        assert torch.equal(got_state[name], tensor), name
