# SPDX-License-Identifier: Apache-2.0
"""``gralora_ext.checkpoint.merge``: the weights that a model in memory has after a merge, in files."""

import pytest
import torch
from checkpoint_helpers import (
    assert_same_weights,
    gpt2,
    gralora,
    llama,
    lora,
    merged_in_memory,
    save_adapter,
    save_base,
)
from transformers import AutoModelForCausalLM

from gralora_ext.checkpoint import merge


def loaded(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, **how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shards", ["single", "sharded"])
def test_has_the_bits_of_merge_and_unload(tmp_path, dtype, shards):
    how = {"max_shard_size": "20KB"} if shards == "sharded" else {}
    base = save_base(tmp_path / "base", llama(), dtype, **how)
    adapter = save_adapter(tmp_path / "adapter", base, gralora(hybrid_r=2))
    report = merge(base, adapter, tmp_path / "out")
    assert report.merged == 14 and (len(report.files) > 1) == (shards == "sharded")
    assert_same_weights(loaded(tmp_path / "out"), merged_in_memory(base, adapter))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        {*(p.name for p in base.iterdir()), "merge.json"}
    )


def test_conv1d_patterns_biases_and_what_is_trained_whole(tmp_path):
    base = save_base(tmp_path / "base", gpt2(tie_word_embeddings=False))
    config = gralora(
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        bias="all",
        modules_to_save=["ln_f", "wpe"],
        rank_pattern={"c_attn": 4},
        alpha_pattern={"h.1.attn.c_proj": 3},
        k_pattern={"c_attn": 4},
        use_rslora=True,
    )

    def train(model):
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or name.endswith(".bias"):
                parameter.normal_()

    adapter = save_adapter(tmp_path / "adapter", base, config, change=train)
    merge(base, adapter, tmp_path / "out")
    assert_same_weights(loaded(tmp_path / "out"), merged_in_memory(base, adapter))


def test_several_adapters_one_after_the_other(tmp_path):
    base = save_base(tmp_path / "base", llama(), torch.bfloat16)
    first = save_adapter(tmp_path / "first", base, gralora())
    second = save_adapter(tmp_path / "second", base, gralora(target_modules=["q_proj"], r=4), seed=2)
    merge(base, [first, second], tmp_path / "out")
    assert_same_weights(loaded(tmp_path / "out"), merged_in_memory(base, first, second))


def test_a_lora(tmp_path):
    base = save_base(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    merge(base, adapter, tmp_path / "out")
    got, expected = loaded(tmp_path / "out").state_dict(), merged_in_memory(base, adapter).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6)


TIED = {
    "projections alone": (gralora, {}),
    "the embedding trained whole": (gralora, {"modules_to_save": ["embed_tokens"]}),
    "the head trained whole": (gralora, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(tmp_path, name):
    base = save_base(tmp_path / "base", llama(tie_word_embeddings=True), torch.bfloat16)
    make, fields = TIED[name]

    def train(model):
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.normal_()

    adapter = save_adapter(tmp_path / "adapter", base, make(**fields), change=train)
    merge(base, adapter, tmp_path / "out")
    got, expected = loaded(tmp_path / "out"), merged_in_memory(base, adapter)
    assert_same_weights(got, expected)
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == (name == "projections alone")
