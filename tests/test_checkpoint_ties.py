# SPDX-License-Identifier: Apache-2.0
"""A head that an adapter changes alone is no longer tied to the embedding, wherever the configuration says that it is."""

import json

import pytest
import torch
from checkpoint_helpers import LLAMA, gralora, save_base
from peft import get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import gralora_ext
from gralora_ext.checkpoint import merge
from gralora_ext.program.errors import FileError


def save(folder, base, load, **fields):
    torch.manual_seed(1)
    with gralora_ext.enable():
        get_peft_model(load(base), gralora(**fields)).save_pretrained(folder)
    return folder


def test_a_model_of_several_parts_is_untied_in_each(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**LLAMA, tie_word_embeddings=True),
        image_token_index=95,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    base = save_base(tmp_path / "base", LlavaForConditionalGeneration(config))
    load = LlavaForConditionalGeneration.from_pretrained
    told = json.loads((base / "config.json").read_text())
    assert told["text_config"].get("tie_word_embeddings") is True
    adapter = save(tmp_path / "adapter", base, load, target_modules=["lm_head"])
    merge(base, adapter, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["tie_word_embeddings"] is False and told["text_config"]["tie_word_embeddings"] is False
    merged, before = load(tmp_path / "out"), load(base)
    embedding = merged.get_input_embeddings().weight
    assert torch.equal(embedding, before.get_input_embeddings().weight)
    assert not torch.equal(merged.lm_head.weight, embedding)


def test_a_model_with_several_ties_is_refused_where_one_is_changed_alone(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    base = save_base(tmp_path / "base", T5ForConditionalGeneration(config))
    head = save(tmp_path / "head", base, AutoModelForSeq2SeqLM.from_pretrained, target_modules=["lm_head"])
    with pytest.raises(
        FileError, match=r"config\.json ties 3 pairs of parameters, and cannot say that lm_head\.weight and shared\."
    ):
        merge(base, head, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    others = save(tmp_path / "others", base, AutoModelForSeq2SeqLM.from_pretrained, target_modules=["q", "v"])
    merge(base, others, tmp_path / "out")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.shared.weight
