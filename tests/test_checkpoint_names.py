# SPDX-License-Identifier: Apache-2.0
"""Tensors of a base are found by the names that adapters use, which transformers tells where the files have others."""

import json
import subprocess
import warnings

import pytest
import torch
from checkpoint_helpers import (
    HIDDEN,
    LLAMA,
    assert_same_weights,
    gpt2,
    gralora,
    llama,
    merged_in_memory,
    save_adapter,
    save_base,
)
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CLIPVisionConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import gralora_ext
from gralora_ext.checkpoint import merge, names
from gralora_ext.program.errors import FileError


def loaded(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, **how)


def rename_tensors(folder, rename):
    path = folder / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def test_files_without_the_prefix_of_the_model(tmp_path):
    base = save_base(tmp_path / "base", gpt2())
    adapter = save_adapter(tmp_path / "adapter", base, gralora(target_modules=["c_attn"], fan_in_fan_out=True))
    expected = merged_in_memory(base, adapter)
    rename_tensors(base, lambda name: name.removeprefix("transformer."))
    merge(base, adapter, tmp_path / "out")
    assert_same_weights(loaded(tmp_path / "out"), expected)
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_an_adapter_of_the_model_without_its_head(tmp_path):
    base = save_base(tmp_path / "base", llama())
    with gralora_ext.enable():
        model = get_peft_model(AutoModel.from_pretrained(base), gralora())
        model.save_pretrained(tmp_path / "adapter")
        expected = model.merge_and_unload()
    merge(base, tmp_path / "adapter", tmp_path / "out")
    assert_same_weights(AutoModel.from_pretrained(tmp_path / "out"), expected)


def test_names_that_transformers_converts(tmp_path):
    """The text model of a model of text and images has other names in files of some years ago."""
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**LLAMA).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ).to_dict(),
    )
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    old = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    old |= {"model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector."}

    def renamed(name):
        return next((to + name.removeprefix(begin) for begin, to in old.items() if name.startswith(begin)), name)

    rename_tensors(tmp_path / "base", renamed)
    loads = LlavaForConditionalGeneration.from_pretrained
    with gralora_ext.enable():
        tuned = get_peft_model(loads(tmp_path / "base"), gralora(target_modules=r".*language_model.*(q_proj|up_proj)"))
        tuned.save_pretrained(tmp_path / "adapter")
        expected = tuned.merge_and_unload()
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out").merged == 4
    assert_same_weights(loads(tmp_path / "out"), expected)


@pytest.fixture
def two_in_one(tmp_path):
    """A folder whose model has layers with square weights of both kinds: BERT's as they are, GPT-2's transposed."""
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=96, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    gpt = GPT2Config(vocab_size=96, n_embd=HIDDEN, n_layer=1, n_head=4, n_positions=64, add_cross_attention=True)
    EncoderDecoderModel(EncoderDecoderConfig(encoder=bert.to_dict(), decoder=gpt.to_dict())).save_pretrained(
        tmp_path / "base"
    )
    return tmp_path


def adapted(folder, targets):
    """The two in one with a new adapter in ``folder / "adapter"``, merged in memory."""
    torch.manual_seed(1)
    with gralora_ext.enable(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        model = get_peft_model(EncoderDecoderModel.from_pretrained(folder / "base"), gralora(target_modules=targets))
        model.save_pretrained(folder / "adapter")
        return model.merge_and_unload()


@pytest.mark.parametrize(
    "targets",
    [
        ["query", "value", "c_attn"],
        ["query", "value", "c_attn", "c_proj"],
        r".*(query|attn\.c_proj)",
        r".*(query|attn\.c_attn|intermediate\.dense)",
    ],
)
def test_a_square_weight_is_transposed_where_its_own_layer_has_it_so(two_in_one, targets):
    expected = adapted(two_in_one, targets)
    path = two_in_one / "adapter" / "adapter_config.json"
    for said in (True, False):  # PEFT writes what it found at the last layer
        path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": said}))
        merge(two_in_one / "base", two_in_one / "adapter", two_in_one / f"out-{said}")
        assert_same_weights(EncoderDecoderModel.from_pretrained(two_in_one / f"out-{said}"), expected)


def test_a_square_weight_of_a_model_that_transformers_does_not_know_is_not_guessed(two_in_one):
    adapted(two_in_one, ["query", "c_attn"])
    path = two_in_one / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "of their own"}))
    with pytest.raises(FileError, match=r"layer encoder\..*query is square, and whether it is stored transposed"):
        merge(two_in_one / "base", two_in_one / "adapter", two_in_one / "out")
    assert not (two_in_one / "out").exists()


def test_layers_that_the_base_does_not_have_are_named_with_what_is_like_them(tmp_path):
    base = save_base(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    small = save_base(tmp_path / "small", llama(num_hidden_layers=1))
    wide = save_base(tmp_path / "wide", llama(intermediate_size=64))
    for other, message in (
        (
            small,
            r"tensor model\.layers\.1\.mlp\.down_proj\.weight, but .*small has none .* is model\.layers\.0\.mlp\.down_proj",
        ),
        (
            wide,
            r"layer model\.layers\.0\.mlp\.down_proj is for a weight \[32, 48\].* but .* of .*wide is F32 \[32, 64\]",
        ),
    ):
        with pytest.raises(FileError, match=message):
            merge(other, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.fixture
def asking(tmp_path):
    """A base and an adapter about which transformers is asked: a matrix that is trained whole may be tied."""
    base = save_base(tmp_path / "base", llama())
    return base, save_adapter(tmp_path / "adapter", base, gralora(modules_to_save=["lm_head"]))


@pytest.mark.parametrize("process", ["this one", "another"])
def test_a_configuration_of_layers_without_end_is_refused(asking, tmp_path, monkeypatch, process):
    base, adapter = asking
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    if process == "another":
        monkeypatch.setattr(names, "_LOADED", "none of those that are loaded")
    with pytest.raises(
        FileError, match=r"config.json tells of a model with more than 1,042 parameters, and its files have 21"
    ):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_question_that_fails_is_told_and_nothing_is_guessed(asking, tmp_path, monkeypatch):
    monkeypatch.setattr(names, "_LOADED", "none of those that are loaded")
    for failure, reason in (
        (subprocess.CalledProcessError(-9, "python", stderr=""), "exit code -9"),
        (
            subprocess.CalledProcessError(1, "python", stderr="Traceback\nImportError: no transformers\n"),
            "no transformers",
        ),
        (subprocess.TimeoutExpired("python", 600), "no answer in 600 s"),
    ):

        def fail(*arguments, failure=failure, **how):
            raise failure

        monkeypatch.setattr(names.subprocess, "run", fail)
        with pytest.raises(FileError, match=f"base: transformers could not be asked for the names .*: .*{reason}"):
            merge(*asking, tmp_path / "out")
    assert not (tmp_path / "out").exists()
