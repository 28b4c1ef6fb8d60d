# SPDX-License-Identifier: Apache-2.0
"""``gralora_ext.checkpoint.merge``: the weights that a model in memory has after a merge, in files."""

import json
import shutil

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
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import gralora_ext
from gralora_ext.checkpoint import merge, pipeline
from gralora_ext.program.errors import FileError


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adapters_in_other_dtypes(tmp_path, dtype):
    base = save_base(tmp_path / "base", llama(), torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, gralora(hybrid_r=2), change=lambda model: model.to(dtype))
    assert load_file(adapter / "adapter_model.safetensors").popitem()[1].dtype == dtype
    merge(base, adapter, tmp_path / "out")
    assert_same_weights(loaded(tmp_path / "out"), merged_in_memory(base, adapter))


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
    "both trained whole, apart": (gralora, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "both trained as one": (gralora, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "both trained as one, LoRA": (lora, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
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
    if make is gralora:
        assert_same_weights(got, expected)
    torch.testing.assert_close(got.lm_head.weight, expected.lm_head.weight, rtol=0, atol=0)
    torch.testing.assert_close(got.model.embed_tokens.weight, expected.model.embed_tokens.weight, rtol=0, atol=0)
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == (name == "projections alone" or "as one" in name)


def test_pieces_smaller_than_a_row_give_the_same_bits(tmp_path, monkeypatch):
    for make, fields in ((llama, {}), (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True})):
        base = save_base(tmp_path / make.__name__, make(), torch.float16)
        adapter = save_adapter(tmp_path / f"{make.__name__}-adapter", base, gralora(hybrid_r=3, **fields))
        merge(base, adapter, tmp_path / f"{make.__name__}-whole")
        for size in (64, 136, 1000):
            monkeypatch.setattr(pipeline, "PIECE", size)
            out = tmp_path / f"{make.__name__}-{size}"
            merge(base, adapter, out)
            assert (out / "model.safetensors").read_bytes() == (
                tmp_path / f"{make.__name__}-whole" / "model.safetensors"
            ).read_bytes()
            monkeypatch.undo()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", ["bf16", "fp16", torch.float32])
def test_dtype_rounds_the_sum_once(tmp_path, stored, wanted):
    base = save_base(tmp_path / "base", llama(), stored)
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    merge(base, adapter, tmp_path / "out", dtype=wanted)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(wanted, torch.float32)
    expected = merged_in_memory(base, adapter, dtype=torch.promote_types(stored, dtype)).to(dtype)
    got = loaded(tmp_path / "out")
    assert_same_weights(got, expected)
    assert got.config.dtype == dtype


def test_max_shard_size_cuts_and_joins_files(tmp_path):
    base = save_base(tmp_path / "base", llama(), torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    many = merge(base, adapter, tmp_path / "many", max_shard_size="15KB")
    assert len(many.files) > 2
    assert all(p.stat().st_size < 17_000 for p in (tmp_path / "many").glob("*.safetensors"))
    assert_same_weights(loaded(tmp_path / "many"), merged_in_memory(base, adapter))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"]
        == many.total_bytes
        == sum(2 * p.numel() for p in loaded(tmp_path / "many").parameters())
    )
    again = merge(tmp_path / "many", adapter, tmp_path / "one", max_shard_size="1GB", scale=0)
    assert again.files == ["model.safetensors"]
    assert_same_weights(loaded(tmp_path / "one"), loaded(tmp_path / "many"))


def test_scale_multiplies_what_is_added(tmp_path):
    base = save_base(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, gralora(alpha=12))
    merge(base, adapter, tmp_path / "half", scale=0.5)
    weaker = save_adapter(tmp_path / "weaker", base, gralora(alpha=6))
    assert_same_weights(loaded(tmp_path / "half"), merged_in_memory(base, weaker))
    merge(tmp_path / "half", adapter, tmp_path / "off", scale=-0.5)
    for got, before in zip(loaded(tmp_path / "off").parameters(), loaded(base).parameters(), strict=True):
        torch.testing.assert_close(got, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stored", ["embed_tokens", "lm_head", "both"])
@pytest.mark.parametrize("with_base", [False, True])
def test_an_adapter_on_a_tied_head_changes_the_head_alone(tmp_path, stored, with_base):
    base = save_base(tmp_path / "base", llama(tie_word_embeddings=True))
    path = base / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors.pop("model.embed_tokens.weight")
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    tensors |= {name: tensor for name, tensor in both.items() if stored == "both" or stored in name}
    save_file(tensors, path, metadata={"format": "pt"})
    adapter = save_adapter(tmp_path / "adapter", base, gralora(target_modules=["lm_head", "q_proj"]))
    if not with_base:  # as PEFT writes it with save_embedding_layers=False
        path = adapter / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if "base_layer" not in name}, path)
    merge(base, adapter, tmp_path / "out")
    tokens = torch.arange(12)[None]
    with gralora_ext.enable():
        expected = PeftModel.from_pretrained(loaded(base), adapter)(tokens).logits
    got = loaded(tmp_path / "out")
    torch.testing.assert_close(got(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.model.embed_tokens.weight, embedding)
    assert got.config.tie_word_embeddings is False


def test_values_that_are_none_are_refused(tmp_path):
    base = save_base(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    for how, message in (
        ({"dtype": "fp8"}, "dtype: expected bf16, fp16 or fp32, got 'fp8'"),
        ({"max_shard_size": "5 apples"}, "max_shard_size: expected"),
        ({"max_shard_size": 0}, "max_shard_size: expected"),
        ({"scale": float("nan")}, "scale: expected a finite number"),
        ({"scale": 10**400}, "scale: expected a finite number, got 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(base, adapter, tmp_path / "out", **how)
    with pytest.raises(ValueError, match="at least one"):
        merge(base, [], tmp_path / "out")


def test_quantized_bases_and_pickles_are_refused_with_the_way_out(tmp_path):
    base = save_base(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(FileError, match=r"quantized \(fp8\): merge into the model that it was made of"):
        merge(base, adapter, tmp_path / "out")
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, base / "model.safetensors")
    with pytest.raises(FileError, match="up_proj.weight has dtype F8_E4M3"):
        merge(base, adapter, tmp_path / "out")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(FileError, match="pytorch_model.bin in place of model.safetensors: pickles can run code"):
        merge(base, adapter, tmp_path / "out")


def test_an_adapter_beside_the_base_is_not_part_of_the_result(tmp_path):
    base = save_base(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    expected = merged_in_memory(base, adapter)
    for file in adapter.iterdir():
        shutil.copy(file, base / file.name)
    (base / "adapter_model.npy").write_bytes(b"weights")
    merge(base, adapter, tmp_path / "out")
    assert_same_weights(loaded(tmp_path / "out"), expected)
    assert not list((tmp_path / "out").glob("adapter_*"))


def test_a_base_without_tensors_is_refused(tmp_path):
    base = save_base(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    save_file({}, base / "model.safetensors")
    with pytest.raises(FileError, match="base has no tensor in its files of weights"):
        merge(base, adapter, tmp_path / "out")


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    base = save_base(tmp_path / "base", llama(), max_shard_size="20KB")
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("../base/model-00001-of-00005.safetensors", "/etc/passwd", ".", "", "model.bin", "a\0b.safetensors"):
        index["weight_map"]["lm_head.weight"] = name
        path.write_text(json.dumps(index))
        with pytest.raises(FileError, match="index.json names"):
            merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("labels", [2, 5])
def test_a_new_head_is_written_and_the_configuration_tells_of_it(tmp_path, labels):
    base = save_base(tmp_path / "base", llama(pad_token_id=0), torch.bfloat16)
    loads = AutoModelForSequenceClassification.from_pretrained
    torch.manual_seed(3)
    with gralora_ext.enable():
        model = get_peft_model(loads(base, num_labels=labels), gralora(task_type="SEQ_CLS"))
        model.save_pretrained(tmp_path / "adapter")
        expected = model.merge_and_unload()
    report = merge(base, tmp_path / "adapter", tmp_path / "out")
    got = loads(tmp_path / "out")
    assert report.replaced == 1 and got.config.num_labels == labels
    assert_same_weights(got, expected)
    assert got.config.architectures == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("bias", ["all", "gralora_only"])
def test_trained_biases_in_a_base_of_links(tmp_path, bias):
    """As a hub's cache has it: links to files elsewhere."""
    stored = save_base(tmp_path / "stored", llama(attention_bias=True), torch.bfloat16)
    base = tmp_path / "base"
    base.mkdir()
    for file in stored.iterdir():
        (base / file.name).symlink_to(file)

    def train(model):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()

    adapter = save_adapter(tmp_path / "adapter", base, gralora(bias=bias), change=train)
    assert merge(base, adapter, tmp_path / "out").replaced == 8
    assert_same_weights(loaded(tmp_path / "out"), merged_in_memory(base, adapter))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_what_cannot_be_written_as_json_is_no_obstacle(tmp_path):
    base = save_base(tmp_path / "base", llama(), max_shard_size="20KB")
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    config, index = base / "config.json", base / "model.safetensors.index.json"
    config.write_text(config.read_text().replace("{", '{"limit": [0, Infinity], "half": "\\ud800",', 1))
    index.write_text(index.read_text().replace('"total_size"', '"half": "\\ud800", "no": NaN, "total_size"', 1))
    merge(base, adapter, tmp_path / "out", dtype="bf16")
    merge(base, adapter, tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == config.read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["limit"][1] == float("inf")


def test_the_number_of_torchs_threads_is_as_before(tmp_path):
    base = save_base(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        merge(base, adapter, tmp_path / "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
