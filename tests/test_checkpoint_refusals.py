# SPDX-License-Identifier: Apache-2.0
"""What a merge refuses before it writes anything."""

import json

import pytest
import torch
from checkpoint_helpers import gralora, llama, save_adapter, save_base
from cli_helpers import call, sentence
from resume_helpers import contents
from safetensors.torch import load_file, save_file

from gralora_ext.checkpoint import header, merge
from gralora_ext.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter
from gralora_ext.program.errors import FileError


def test_a_scale_for_an_adapter_that_holds_tensors_whole(tmp_path):
    base = save_base(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, gralora(modules_to_save=["lm_head"]))
    for scale in (0, -1, 0.5):
        with pytest.raises(FileError, match=r"scale: expected 1 for .*adapter, since it holds lm_head\.weight whole"):
            merge(base, adapter, tmp_path / "out", scale=scale)
        assert not (tmp_path / "out").exists()
    merge(base, adapter, tmp_path / "out", scale=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["q_proj.gralora_B", "lm_head.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_that_is_not_finite_is_named_before_anything_is_written(tmp_path, value, what, dtype):
    base = save_base(tmp_path / "base", llama(num_hidden_layers=1))
    adapter = save_adapter(tmp_path / "adapter", base, gralora(modules_to_save=["lm_head"]))
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    next(tensor for name, tensor in tensors.items() if what in name).view(-1)[-1] = value
    save_file(tensors, path)
    with pytest.raises(FileError, match=rf"adapter_model\.safetensors: \S+{what} holds NaN or infinity"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("state", ["foreign", "other merge", "done"])
def test_a_dry_run_refuses_the_folders_that_the_merge_refuses(sharded, tmp_path, state):
    base, adapter = sharded
    out, how = tmp_path / "out", {"scale": 0.5}
    if state == "foreign":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    else:
        merge(base, adapter, out, **(how if state == "done" else {}))
    before = contents(out)
    if state == "done":
        assert merge(base, adapter, out, **how, dry_run=True).was_done
    else:
        with pytest.raises(FileError) as real:
            merge(base, adapter, out, **how)
        with pytest.raises(FileError) as dry:
            merge(base, adapter, out, **how, dry_run=True)
        assert str(dry.value) == str(real.value)
    done = call("merge", base, adapter, "out", "--scale", "0.5", "--dry-run", cwd=tmp_path)
    told = done.stdout if state == "done" else sentence(done)
    expected = {"foreign": "holds other files", "other merge": "holds another merge", "done": "has this merge already"}
    assert expected[state] in told and "would be" not in done.stdout
    assert contents(out) == before


def test_a_dry_run_over_the_beginning_of_a_merge_leaves_it(sharded, tmp_path, monkeypatch):
    from resume_helpers import break_off

    out = tmp_path / "out"
    break_off(monkeypatch, *sharded, out)
    before = contents(out)
    assert merge(*sharded, out, dry_run=True).was_done is False
    assert contents(out) == before
    assert merge(*sharded, out).kept_files == 1


def test_a_header_of_all_experts_is_read_and_one_that_is_too_long_is_told(tmp_path, monkeypatch):
    layers = [
        f"base_model.model.model.layers.{n}.mlp.experts.{e}.{p}_proj.gralora_{part}"
        for n in range(48)
        for e in range(128)
        for p in ("gate", "up", "down")
        for part in "AB"
    ]
    path = tmp_path / "a.safetensors"
    tensors = [(name, "U8", (1,)) for name in layers]
    writer = SafetensorsWriter(path, tensors, {})
    assert len(writer.header) > 3 << 20
    writer.finish()
    writer.close()
    with SafetensorsFile(path) as file:
        assert len(file.tensors) == len(layers)
    monkeypatch.setattr("gralora_ext.checkpoint.safetensors_file.MOST_HEADER_BYTES", 3 << 20)
    told = r"a\.safetensors: its list of tensors takes [\d,]+ bytes: expected a header of at most 3,145,728"
    with pytest.raises(FileError, match=told):
        SafetensorsFile(path)
    with pytest.raises(FileError, match=told.replace("a\\.", "b\\.")):
        SafetensorsWriter(tmp_path / "b.safetensors", tensors, {})
    assert not (tmp_path / "b.safetensors").exists()
    assert header.MOST_HEADER_BYTES == 32 << 20


@pytest.mark.parametrize(
    "metadata", ['{"total_size": 1, "more": {"a": [1, {"b": "}"}]}, "format": "pt"}', "[]", '"text"']
)
def test_an_index_with_other_metadata_is_read(own_sharded, metadata):
    base, adapter, out = own_sharded
    path = base / "model.safetensors.index.json"
    weight_map = json.dumps(json.loads(path.read_text())["weight_map"])
    path.write_text(f'{{"metadata": {metadata}, "weight_map": {weight_map}}}')
    merge(base, adapter, out)
    written = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]
    assert written["total_size"] > 1 and written.get("format") == ("pt" if "format" in metadata else None)
    path.write_text(f'{{"metadata": {"[" * 100_000}, "weight_map": {weight_map}}}')
    with pytest.raises(FileError, match="has a metadata that is no JSON of at most 65,536 characters"):
        merge(base, adapter, out)
