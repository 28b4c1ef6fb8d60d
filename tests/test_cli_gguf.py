# SPDX-License-Identifier: Apache-2.0
"""GGUF files: converted once into a cache, whose folders are checked before they are used."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import call, make_data
from torch.utils.cpp_extension import get_default_build_root

from gralora_ext.cli.gguf import cache_folder, folder_of_gguf, rope_types
from gralora_ext.program.errors import JobError

gguf = pytest.importorskip("gguf")


def make_gguf(file: Path, without: tuple[str, ...] = (), change: Any = None) -> Path:
    """A Llama of one layer, in 32-wide Q8_0 blocks, with a byte-level tokenizer; ``change(writer)`` may add to it."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "at", "cat"]
    width, inner = 64, 96
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a t", "c at"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        if name in without:
            return
        values = generator.standard_normal(shape).astype(np.float32) * 0.1
        if len(shape) == 1:
            writer.add_tensor(name, values + 1)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), width)
    add("output.weight", len(tokens), width)
    add("output_norm.weight", width)
    for name, shape in {
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (width // 2, width),
        "attn_v": (width // 2, width),
        "attn_output": (width, width),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }.items():
        add(f"blk.0.{name}.weight", *shape)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    # The development build lies in a cache too, and should not be made again here.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_conversion_happens_once_and_stock_transformers_loads_it(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said: list[str] = []
    folder = folder_of_gguf(make_gguf(tmp_path / "m.gguf"), said.append)
    assert folder.parent == cache_folder() == tmp_path / "cache" / "gralora_ext"
    assert len(said) == 1 and "converting m.gguf" in said[0]
    assert folder_of_gguf(tmp_path / "m.gguf", said.append) == folder and len(said) == 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    assert (
        AutoTokenizer.from_pretrained(folder)
        .decode(AutoTokenizer.from_pretrained(folder)("a cat")["input_ids"])
        .endswith("a cat")
    )
    assert all(path.stat().st_mode & 0o444 == 0o444 & ~os.umask(os.umask(0)) for path in folder.iterdir())


@pytest.mark.parametrize("damage", ["flipped byte", "cut", "missing file", "no list"])
def test_damaged_cache_is_noticed_and_made_again(tmp_path, damage):
    said: list[str] = []
    folder = folder_of_gguf(make_gguf(tmp_path / "m.gguf"), said.append)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flipped byte":
        weights.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "missing file":
        (folder / "config.json").unlink()
    else:
        (folder / "gralora_ext.json").unlink()
    assert folder_of_gguf(tmp_path / "m.gguf", said.append) == folder
    assert any("damaged" in text for text in said)
    assert weights.read_bytes() == content


def test_file_that_is_no_gguf_is_one_sentence_and_leaves_no_cache(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(JobError, match=r"m\.gguf cannot be read as a GGUF model: "):
        folder_of_gguf(tmp_path / "m.gguf", print)
    assert [p.name for p in cache_folder().iterdir()] == [".lock"]


def test_file_that_lacks_a_weight_is_refused_and_leaves_no_cache(tmp_path):
    path = make_gguf(tmp_path / "m.gguf", without=("blk.0.attn_q.weight", "blk.0.ffn_up.weight"))
    with pytest.raises(
        JobError, match=r"m\.gguf lacks 2 of its model's weights, such as model\.layers\.0\.mlp\.up_proj\.weight"
    ):
        folder_of_gguf(path, print)
    assert [p.name for p in cache_folder().iterdir()] == [".lock"]


def test_a_head_that_is_tied_to_the_embedding_is_not_missed(tmp_path):
    folder = folder_of_gguf(make_gguf(tmp_path / "m.gguf", without=("output.weight",)), print)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_part_of_a_split_model_is_refused_by_its_name(tmp_path):
    path = make_gguf(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(JobError, match="is one of 2 parts of a model: join them with `llama-gguf-split --merge`"):
        folder_of_gguf(path, print)
    assert folder_of_gguf(path.rename(tmp_path / "m-00001-of-00001.gguf"), print).is_dir()


SCALED = {
    "rope_freqs.weight": lambda writer: writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32)),
    "llama.rope.scaling.type 'yarn'": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
}
NOT_SCALED = {
    "factors of one": lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32)),
    "type none": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE),
}


@pytest.mark.parametrize("what", SCALED)
def test_scaled_rotary_embeddings_which_transformers_would_drop_are_refused(tmp_path, what):
    path = make_gguf(tmp_path / "m.gguf", change=SCALED[what])
    with pytest.raises(JobError, match=re.escape(f"m.gguf scales its rotary embeddings ({what})")):
        folder_of_gguf(path, print)
    assert [p.name for p in cache_folder().iterdir()] == [".lock"]


@pytest.mark.parametrize("what", NOT_SCALED)
def test_rotary_embeddings_that_are_not_scaled_are_read(tmp_path, what):
    assert folder_of_gguf(make_gguf(tmp_path / "m.gguf", change=NOT_SCALED[what]), print).is_dir()


def test_scaling_that_transformers_reads_is_none_that_is_dropped():
    from transformers import Gemma3TextConfig, GptOssConfig, LlamaConfig

    assert rope_types(LlamaConfig()) == {"default"}
    assert rope_types(GptOssConfig()) != {"default"}
    assert rope_types(Gemma3TextConfig()) == {"default"}


def test_job_on_a_gguf_file_names_a_base_that_loads(tmp_path):
    make_gguf(tmp_path / "m.gguf")
    make_data(tmp_path / "d.jsonl")
    job = ("--model", "m.gguf", "--data", "d.jsonl", "--steps", 2, "--max-length", 64, "--sample-tokens", 4)
    done = call("finetune", *job, "--dtype", "bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "runs" / "m-d"
    base = json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_absolute() and (Path(base) / "config.json").is_file()
    assert json.loads((output / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
