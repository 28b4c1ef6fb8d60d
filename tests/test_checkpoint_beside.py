# SPDX-License-Identifier: Apache-2.0
"""What else lies in the folder of a merge's result stays as it is, or is kept under another name."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from resume_helpers import break_off, contents, flip

from gralora_ext.checkpoint import merge, pipeline, sealed, staging
from gralora_ext.program.errors import FileError


def test_an_output_that_was_changed_is_noticed(sharded, tmp_path):
    out = tmp_path / "out"
    merge(*sharded, out)
    before = contents(out)
    shard = next(out.glob("*.safetensors"))
    flip(shard)
    flipped = shard.read_bytes()
    with pytest.raises(FileError, match="not as it was written"):
        merge(*sharded, out)
    report = merge(*sharded, out, overwrite=True)
    (kept,) = report.moved_aside
    assert kept == shard.with_name(f"{shard.name}.kept")
    assert contents(out) == {**before, kept.name: flipped}


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model-00002-of-00003.safetensors", "merge.json"])
@pytest.mark.parametrize("state", ["new", "another merge", "the same merge, broken off"])
def test_a_file_that_comes_while_a_merge_is_written_is_kept(sharded, tmp_path, monkeypatch, name, state):
    out = tmp_path / "out"
    merge(*sharded, tmp_path / "alone")
    if state == "another merge":
        merge(*sharded, out, scale=0.5)
    elif state != "new":
        break_off(monkeypatch, *sharded, out)
    write = pipeline.Pipeline.write

    def meanwhile(*args):
        (out / name).write_text("mine")
        return write(*args)

    monkeypatch.setattr(pipeline.Pipeline, "write", meanwhile)
    report = merge(*sharded, out, overwrite=True)
    assert report.moved_aside == [out / f"{name}.kept"]
    assert contents(out) == {**contents(tmp_path / "alone"), f"{name}.kept": b"mine"}


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("again", [0.5, 0.25])
def test_a_merge_over_one_that_was_being_placed_over_another_keeps_nothing_of_either(
    sharded, tmp_path, monkeypatch, after, again
):
    out = tmp_path / "out"
    merge(*sharded, out, max_shard_size="30KB")
    replace, count = os.replace, 0

    def broken(path, to):
        nonlocal count
        count += Path(to).parent == out
        if count > after:
            raise SystemExit
        replace(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", broken)
        with pytest.raises(SystemExit):
            merge(*sharded, out, scale=0.5, overwrite=True)
    assert not (out / "config.json").exists()
    assert merge(*sharded, out, scale=again, overwrite=True).moved_aside == []
    merge(*sharded, tmp_path / "anew", scale=again)
    assert contents(out) == contents(tmp_path / "anew")


def test_a_changed_file_stays_where_the_result_has_none_of_its_name(sharded, tmp_path):
    out = tmp_path / "out"
    merge(*sharded, out)
    index = out / "model.safetensors.index.json"
    index.write_text("mine")
    report = merge(*sharded, out, max_shard_size="1GB", overwrite=True)
    assert report.moved_aside == [] and index.read_text() == "mine"
    assert not list(out.glob("model-*"))


def test_foreign_files_are_never_touched(sharded, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileError, match=r"other files \(model.safetensors\)"):
            merge(*sharded, out, overwrite=overwrite)
    assert contents(out) == {"model.safetensors": b"mine"}
    ours = tmp_path / "ours"
    merge(*sharded, ours)
    (ours / "model.safetensors").write_text("mine")
    with pytest.raises(FileError, match="model.safetensors is in the way"):
        merge(*sharded, ours, max_shard_size="1GB", overwrite=True)
    assert (ours / "model.safetensors").read_text() == "mine"


def test_a_result_in_several_files_takes_the_place_of_one_in_one(sharded, tmp_path):
    out = tmp_path / "out"
    merge(*sharded, out, max_shard_size="1GB")
    assert merge(*sharded, out, overwrite=True).moved_aside == []
    merge(*sharded, tmp_path / "anew")
    assert contents(out) == contents(tmp_path / "anew")


def test_a_single_file_beside_a_result_in_several_is_refused(sharded, tmp_path, monkeypatch):
    """It would be loaded in their place."""
    out = tmp_path / "out"
    merge(*sharded, out, max_shard_size="1GB")
    single = out / "model.safetensors"
    flip(single)
    before = contents(out)
    with pytest.raises(FileError, match=r"model.safetensors would be loaded in place of the result"):
        merge(*sharded, out, overwrite=True)
    assert contents(out) == before
    single.rename(tmp_path / single.name)
    merge(*sharded, out, overwrite=True)
    shutil.copy(tmp_path / single.name, single)
    before = contents(out)
    for overwrite in (False, True):
        with pytest.raises(FileError, match="would be loaded in place"):
            merge(*sharded, out, overwrite=overwrite)
    assert contents(out) == before

    def meanwhile(*args):
        shutil.copy(tmp_path / single.name, single)
        return write(*args)

    write = pipeline.Pipeline.write
    monkeypatch.setattr(pipeline.Pipeline, "write", meanwhile)
    single.unlink()
    with pytest.raises(FileError, match="would be loaded in place"):
        merge(*sharded, out, scale=0.5, overwrite=True)
    single.unlink()
    assert merge(*sharded, out, scale=0.5, overwrite=True).kept_files == 3


ENTRY = {"bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest(), "stamp": []}


CRAFTED = {
    "theirs elsewhere": {"theirs": {"../mine": ENTRY}},
    "theirs, as a list": {"theirs": ["../mine"]},
    "theirs below": {"theirs": {"a/../../mine": ENTRY}},
    "the folder above": {"theirs": {"..": ENTRY}},
    "outputs elsewhere": {"outputs": {"../mine": ENTRY}},
    "no file's name": {"outputs": {"a\0b": ENTRY}},
    "an entry without a digest": {"outputs": {"tokenizer.json": {"bytes": 4}}},
    "an input without a stamp": {"inputs": {"/a": {"bytes": 4, "sha256": ""}}},
    "a request that is none": {"request": []},
    "no placing": {"placing": None},
    "no theirs": {"theirs": None},
    "no inputs": {"inputs": None},
    "no request": {"request": None},
}


@pytest.mark.parametrize("name", CRAFTED)
@pytest.mark.parametrize("placing", [False, True])
def test_a_state_that_no_merge_wrote_is_none(sharded, tmp_path, monkeypatch, name, placing):
    out = tmp_path / "out"
    (tmp_path / "mine").write_bytes(b"mine")
    break_off(monkeypatch, *sharded, out)
    state = out / staging.STAGE / staging.STATE
    content = {**json.loads(state.read_text()), "placing": placing, **CRAFTED[name]}
    del content["seal"]
    sealed.write_sealed(state, {key: value for key, value in content.items() if value is not None})
    assert merge(*sharded, out).kept_files == 0
    assert (tmp_path / "mine").read_bytes() == b"mine"
    merge(*sharded, tmp_path / "anew")
    assert contents(out) == contents(tmp_path / "anew")


def test_nothing_is_read_from_where_it_writes(sharded, tmp_path):
    base, adapter = sharded
    for out in (base, adapter):
        before = contents(out)
        with pytest.raises(FileError, match="is read"):
            merge(base, adapter, out, overwrite=True)
        assert contents(out) == before
