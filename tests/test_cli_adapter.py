# SPDX-License-Identifier: Apache-2.0
"""The adapter's options: all fields of GraloraConfig, and LoRA's for --backend lora; each is trained, merged and resumed."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
import torch
from cli_helpers import call, make_data, make_model, metrics, same_end, sentence, until
from safetensors.torch import load_file

import gralora_ext
from gralora_ext.cli.option_table import OPTIONS

pytestmark = pytest.mark.usefixtures("no_plot")
JOB = ("finetune", "--model", "model", "--data", "data.jsonl", "--steps", 4, "--lr", 0.02, "--r", 4, "--max-length", 64)
JOB += ("--sample-tokens", 2, "--save-every", 2, "--eval-every", 2, "--lr-schedule", "constant")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    return folder


# Fields under another name here, and those that the job decides by itself.
RENAMED = {"gralora_dropout": "dropout", "gralora_k": "k"}
DECIDED = {
    "task_type",
    "peft_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
}
DECIDED |= {"fan_in_fan_out"}


def test_every_field_of_the_configuration_has_an_option():
    fields = {field.name for field in dataclasses.fields(gralora_ext.GraloraConfig)}
    assert {RENAMED.get(name, name) for name in fields - DECIDED} <= OPTIONS.keys()


TOGETHER = """
    --rank-pattern q_proj=8 --alpha-pattern q_proj=2.5 --k-pattern q_proj=4 --use-rslora --init-weights gaussian
    --target-modules q_proj up_proj down_proj --exclude-modules down_proj
    --layers-to-transform 1 --layers-pattern layers --trainable-token-indices 5 9 --modules-to-save lm_head
"""
# The options, and what then stands in adapter_config.json.
CASES = {
    "together": (
        TOGETHER.split(),
        {
            "rank_pattern": {"q_proj": 8},
            "alpha_pattern": {"q_proj": 2.5},
            "k_pattern": {"q_proj": 4},
            "use_rslora": True,
            "exclude_modules": ["down_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
            "trainable_token_indices": [5, 9],
            "modules_to_save": ["lm_head"],
            "init_weights": "gaussian",
        },
    ),
    "rank_pattern": (
        ("--rank-pattern", "q_proj=8", "mlp.up_proj=2"),
        {"rank_pattern": {"q_proj": 8, "mlp.up_proj": 2}},
    ),
    "layers": (("--layers-to-transform", 1), {"layers_to_transform": [1]}),
    "tokens": (("--trainable-token-indices", 5, 9), {"trainable_token_indices": [5, 9]}),
    "tokens by name": (
        ("--trainable-token-indices", '{"embed_tokens": [5]}'),
        {"trainable_token_indices": {"embed_tokens": [5]}},
    ),
    "modules_to_save": (("--modules-to-save", "lm_head"), {"modules_to_save": ["lm_head"]}),
    "orthogonal": (("--init-weights", "orthogonal"), {"init_weights": "orthogonal"}),
    "random": (("--init-weights", "false"), {"init_weights": False}),
    "auto": (("--k", "auto"), {}),
    "peft": (("--backend", "peft", "--modules-to-save", "lm_head"), {"modules_to_save": ["lm_head"]}),
    "lora": (("--backend", "lora", "--rank-pattern", "q_proj=8", "--use-rslora"), {"rank_pattern": {"q_proj": 8}}),
    "dora": (("--backend", "lora", "--use-dora"), {"use_dora": True}),
    "pissa": (("--backend", "lora", "--init_lora_weights", "pissa"), {"init_lora_weights": "pissa"}),
    "olora": (("--backend", "lora", "--init_lora_weights", "olora"), {"init_lora_weights": "olora"}),
}
# The others go the same way.
SHOWN = ("together", "rank_pattern", "layers", "tokens", "modules_to_save", "peft", "lora", "dora", "pissa")


def trained(work, name):
    """What a case's job leaves; it is run once."""
    output = work / name
    if not output.exists():
        done = call(*JOB, *CASES[name][0], "--output", name, cwd=work)
        assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHOWN else pytest.mark.exhaustive) for name in CASES]
)
def test_job_with_it_is_merged_right_and_resumes_to_the_last_bit(work, name):
    more, expected = CASES[name]
    output = trained(work, name)
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert {k: sorted(v) if isinstance(v, list) else v for k, v in config.items()}.items() >= expected.items()
    assert metrics(output)["merged_logits"]["relative"] <= 1e-5
    job = (*JOB, "--no-merge", *more, "--output", f"{name} again")
    until(2, output, work / f"{name} again")
    again = call(*job, "--resume", cwd=work)
    assert again.returncode == 0, again.stderr
    same_end(work / f"{name} again", output)


@pytest.mark.parametrize("name", ["rank_pattern", "pissa", "modules_to_save", "tokens"])
def test_adapter_on_its_base_is_the_merged_model(work, name):
    from transformers import AutoModelForCausalLM

    output = trained(work, name)
    base = AutoModelForCausalLM.from_pretrained(work / "model")
    with gralora_ext.enable():
        adapted = peft.PeftModel.from_pretrained(base, output / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(output / "merged").eval()
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("backend", "bias"), [("fused", "all"), ("peft", "lora_only"), ("lora", "lora_only")])
def test_trained_biases_are_saved_merged_and_resumed(work, backend, bias):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    biased = work / "biased"
    if not biased.exists():
        torch.manual_seed(0)
        config = LlamaConfig.from_pretrained(work / "model", attention_bias=True, mlp_bias=True)
        LlamaForCausalLM(config).save_pretrained(biased)
        AutoTokenizer.from_pretrained(work / "model").save_pretrained(biased)
    name = f"{backend} {bias}"
    job = (*JOB, "--model", "biased", "--backend", backend, "--bias", bias, "--target-modules", "q_proj", "up_proj")
    assert call(*job, "--output", name, cwd=work).returncode == 0
    merged = load_file(work / name / "merged" / "model.safetensors")
    changed = {key.split(".")[-2] for key, tensor in merged.items() if key.endswith("bias") and tensor.any()}
    assert changed == ({"q_proj", "up_proj"} if bias == "lora_only" else {*changed, "down_proj", "v_proj"})
    job = (*job, "--no-merge", "--output", f"{name} again")
    until(2, work / name, work / f"{name} again")
    assert call(*job, "--resume", cwd=work).returncode == 0
    same_end(work / f"{name} again", work / name)


def test_patterns_reach_the_layers(work):
    tensors = load_file(trained(work, "rank_pattern") / "adapter" / "adapter_model.safetensors")
    ranks = {name.split(".")[-2]: t.shape[-1] for name, t in tensors.items() if name.endswith("gralora_A")}
    assert (ranks["q_proj"], ranks["up_proj"], ranks["k_proj"]) == (8, 2, 4)
    tensors = load_file(trained(work, "layers") / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[4] for name in tensors} == {"1"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--exclude-modules", ".*"), "the adapter does not fit model: "),
        (("--rank-pattern", "q_proj=3"), "the adapter does not fit model: "),
        (("--k-pattern", "q_proj=3"), "the adapter does not fit model: "),
        (("--rank-pattern", "q_proj(=4"), "the adapter does not fit model: rank_pattern: 'q_proj(' is no name"),
        (("--layers-to-transform", "9"), "the adapter does not fit model: "),
        (
            ("--layers-to-transform", "1", "--target-modules", ".*q_proj"),
            "--layers-to-transform needs names in --target",
        ),
        (("--backend", "lora", "--lora-bias"), "--lora-bias cannot be merged, since base_model.model.model.layers.0"),
        (("--trainable-token-indices", "999"), "the adapter does not fit model: "),
        (("--trainable-token-indices", '{"nothing": [1]}'), "the adapter does not fit model: "),
        (("--modules-to-save", "nothing"), "--modules-to-save: 'nothing' matches no module of the model"),
        (("--init-weights", "orthogonal", "--k", "4"), "the adapter does not fit model: "),
    ],
)
def test_adapter_that_does_not_fit_is_one_sentence(work, more, says):
    done = call(*JOB, *more, "--output", "none", cwd=work)
    assert done.returncode == 2, done.stdout
    assert says in sentence(done)
    assert not (work / "none").exists()


def test_a_head_that_is_the_embedding_is_merged_in_files_alone(work):
    """A merge in memory would add the adapter to the embedding too."""
    from transformers import AutoModelForCausalLM

    tied = AutoModelForCausalLM.from_pretrained(work / "model", tie_word_embeddings=True)
    tied.tie_weights()
    tied.save_pretrained(work / "tied")
    for file in (work / "model").glob("tokenizer*"):
        (work / "tied" / file.name).write_bytes(file.read_bytes())
    job = [str(word) for word in JOB]
    job[job.index("--model") + 1] = "tied"
    job += ["--target-modules", "q_proj", "lm_head", "--output", "of tied"]
    done = call(*job, cwd=work)
    assert done.returncode == 2
    assert "--target-modules: lm_head shares its weight with the embedding" in sentence(done)
    done = call(*job, "--no-merge", cwd=work)
    assert done.returncode == 0, done.stderr
    done = call("merge", "tied", "of tied/adapter", "merged tied", cwd=work)
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(work / "merged tied")
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.get_input_embeddings().weight, tied.get_input_embeddings().weight)
    assert not torch.equal(merged.lm_head.weight, tied.lm_head.weight)
