# SPDX-License-Identifier: Apache-2.0
"""A merge that was broken off goes on, and what is not its own stays as it is."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import gralora, llama, save_adapter, save_base
from safetensors.torch import load_file

from gralora_ext.checkpoint import merge, pipeline, staging
from gralora_ext.program.errors import FileError, JobError

PROGRAM = Path(__file__).with_name("killed_merge.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    base = save_base(folder / "base", llama(), torch.bfloat16, max_shard_size="20KB")
    return base, save_adapter(folder / "adapter", base, gralora())


@pytest.fixture
def own(tmp_path):
    """A base and an adapter that a test may change."""
    base = save_base(tmp_path / "base", llama(), torch.bfloat16, max_shard_size="20KB")
    return base, save_adapter(tmp_path / "adapter", base, gralora()), tmp_path / "out"


def killed(base, adapter, out, *how):
    command = [sys.executable, PROGRAM, base, adapter, out, *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return [(int(count), digest) for count, digest in map(str.split, lines)]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def break_off(monkeypatch, base, adapter, out, after=1, **how):
    """A merge that fails when it has finished so many files of weights."""
    write, count = pipeline.Pipeline.write, 0

    def broken(*args):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.Pipeline, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            merge(base, adapter, out, **how)


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.long)])
def test_killed_before_any_call_it_writes_the_same_files(folders, tmp_path, step):
    found = killed(*folders, tmp_path / "out", "calls", str(step))
    assert len(found) > 60 / step and len({digest for _, digest in found}) == 1


@pytest.mark.parametrize(
    "kills", [pytest.param(20, marks=pytest.mark.long), pytest.param(100, marks=pytest.mark.exhaustive)]
)
def test_killed_at_random_moments_it_writes_the_same_files(tmp_path, kills):
    base = save_base(
        tmp_path / "base", llama(hidden_size=512, intermediate_size=2048), torch.bfloat16, max_shard_size="3MB"
    )
    adapter = save_adapter(tmp_path / "adapter", base, gralora(r=64))
    found = killed(base, adapter, tmp_path / "out", "times", str(kills), "0")
    assert sum(count for count, _ in found) >= kills and len({digest for _, digest in found}) == 1


def test_goes_on_with_the_files_that_are_missing(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    break_off(monkeypatch, *folders, out, after=1)
    assert [p.name for p in out.iterdir()] == [".gralora_ext-merge"]
    report = merge(*folders, out)
    assert report.kept_files == 1 and len(report.files) > 2
    merge(*folders, tmp_path / "unbroken")
    assert contents(out) == contents(tmp_path / "unbroken")


def test_a_repeated_merge_reads_no_weights(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge(*folders, out)
    before = contents(out)
    real = staging.sha256_of
    monkeypatch.setattr(staging, "sha256_of", lambda path: {"config.json": real(path)}[path.name])
    monkeypatch.setattr(pipeline, "Pipeline", None)
    assert merge(*folders, out).was_done
    assert contents(out) == before


def test_a_repeated_merge_of_copied_files_is_done_too(own):
    base, adapter, out = own
    merge(base, adapter, out)
    for path in (*base.iterdir(), *adapter.iterdir(), *out.iterdir()):
        os.utime(path)
    assert merge(base, adapter, out).was_done


def test_files_of_the_base_keep_their_content_whatever_their_names(own, monkeypatch):
    base, adapter, out = own
    names = ("state.json", "merge.json.new", "model.safetensors.part", "config.json.new")
    for name in names:
        (base / name).write_text(name)
    break_off(monkeypatch, base, adapter, out)
    merge(base, adapter, out)
    assert [(out / name).read_text() for name in names] == list(names)
    assert merge(base, adapter, out).was_done


CHANGES = {
    "a weight of the base": lambda base, adapter: flip(next(base.glob("*1-of*.safetensors"))),
    "the tokenizer": lambda base, adapter: (base / "tokenizer.json").write_text("{}"),
    "a new file": lambda base, adapter: (base / "vocab.txt").write_text("a"),
    "a weight of the adapter": lambda base, adapter: flip(adapter / "adapter_model.safetensors"),
    "alpha": lambda base, adapter: change_json(adapter / "adapter_config.json", alpha=99),
}


def flip(path):
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if it were older


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("state", ["broken off", "done"])
def test_a_changed_input_is_noticed_and_nothing_is_lost(own, monkeypatch, name, state):
    base, adapter, out = own
    if state == "done":
        merge(base, adapter, out)
    else:
        break_off(monkeypatch, base, adapter, out)
    before = contents(out)
    CHANGES[name](base, adapter)
    with pytest.raises(FileError, match="since.*overwrite|new since"):
        merge(base, adapter, out)
    assert contents(out) == before
    merge(base, adapter, out, overwrite=True)
    merge(base, adapter, out.with_name("anew"))
    assert contents(out) == contents(out.with_name("anew"))


@pytest.mark.parametrize("state", ["broken off", "done"])
def test_another_request_needs_overwrite_and_leaves_nothing_of_the_old_one(folders, tmp_path, monkeypatch, state):
    out = tmp_path / "out"
    if state == "done":
        merge(*folders, out)
        (out / "notes.txt").write_text("mine")
    else:
        break_off(monkeypatch, *folders, out)
    before = contents(out)
    with pytest.raises(FileError, match=r"scale was 1\.0, and is 0\.5"):
        merge(*folders, out, scale=0.5)
    assert contents(out) == before
    merge(*folders, out, scale=0.5, max_shard_size="1GB", overwrite=True)
    merge(*folders, tmp_path / "anew", scale=0.5, max_shard_size="1GB")
    expected = contents(tmp_path / "anew")
    assert "model.safetensors" in expected and "model.safetensors.index.json" not in expected
    assert contents(out) == {**expected, **({"notes.txt": b"mine"} if state == "done" else {})}


@pytest.mark.parametrize("lost", ["model-00001-of-00003.safetensors", "config.json", "tokenizer.json"])
def test_what_is_lost_after_the_last_rename_is_written_again(folders, tmp_path, monkeypatch, lost):
    out = tmp_path / "out"

    def killed(path):
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(staging.shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            merge(*folders, out)
    before = {name: data for name, data in contents(out).items() if not name.startswith(".")}
    (out / lost).unlink()
    merge(*folders, out)
    assert contents(out) == before


def test_an_output_that_was_changed_is_noticed(folders, tmp_path):
    out = tmp_path / "out"
    merge(*folders, out)
    before = contents(out)
    shard = next(out.glob("*.safetensors"))
    flip(shard)
    flipped = shard.read_bytes()
    with pytest.raises(FileError, match="not as it was written"):
        merge(*folders, out)
    report = merge(*folders, out, overwrite=True)
    (kept,) = report.moved_aside
    assert kept == shard.with_name(f"{shard.name}.kept")
    assert contents(out) == {**before, kept.name: flipped}


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model-00002-of-00003.safetensors", "merge.json"])
@pytest.mark.parametrize("state", ["new", "another merge", "the same merge, broken off"])
def test_a_file_that_comes_while_a_merge_is_written_is_kept(folders, tmp_path, monkeypatch, name, state):
    out = tmp_path / "out"
    merge(*folders, tmp_path / "alone")
    if state == "another merge":
        merge(*folders, out, scale=0.5)
    elif state != "new":
        break_off(monkeypatch, *folders, out)
    write = pipeline.Pipeline.write

    def meanwhile(*args):
        (out / name).write_text("mine")
        return write(*args)

    monkeypatch.setattr(pipeline.Pipeline, "write", meanwhile)
    report = merge(*folders, out, overwrite=True)
    assert report.moved_aside == [out / f"{name}.kept"]
    assert contents(out) == {**contents(tmp_path / "alone"), f"{name}.kept": b"mine"}


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("again", [0.5, 0.25])
def test_a_merge_over_one_that_was_being_placed_over_another_keeps_nothing_of_either(
    folders, tmp_path, monkeypatch, after, again
):
    out = tmp_path / "out"
    merge(*folders, out, max_shard_size="30KB")
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
            merge(*folders, out, scale=0.5, overwrite=True)
    assert not (out / "config.json").exists()
    assert merge(*folders, out, scale=again, overwrite=True).moved_aside == []
    merge(*folders, tmp_path / "anew", scale=again)
    assert contents(out) == contents(tmp_path / "anew")


def test_a_changed_file_stays_where_the_result_has_none_of_its_name(folders, tmp_path):
    out = tmp_path / "out"
    merge(*folders, out)
    index = out / "model.safetensors.index.json"
    index.write_text("mine")
    report = merge(*folders, out, max_shard_size="1GB", overwrite=True)
    assert report.moved_aside == [] and index.read_text() == "mine"
    assert not list(out.glob("model-*"))


def test_foreign_files_are_never_touched(folders, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileError, match=r"other files \(model.safetensors\)"):
            merge(*folders, out, overwrite=overwrite)
    assert contents(out) == {"model.safetensors": b"mine"}
    ours = tmp_path / "ours"
    merge(*folders, ours)
    (ours / "model.safetensors").write_text("mine")
    with pytest.raises(FileError, match="model.safetensors is in the way"):
        merge(*folders, ours, max_shard_size="1GB", overwrite=True)
    assert (ours / "model.safetensors").read_text() == "mine"


def test_a_result_in_several_files_takes_the_place_of_one_in_one(folders, tmp_path):
    out = tmp_path / "out"
    merge(*folders, out, max_shard_size="1GB")
    assert merge(*folders, out, overwrite=True).moved_aside == []
    merge(*folders, tmp_path / "anew")
    assert contents(out) == contents(tmp_path / "anew")


def test_a_single_file_beside_a_result_in_several_is_refused(folders, tmp_path, monkeypatch):
    """It would be loaded in their place."""
    out = tmp_path / "out"
    merge(*folders, out, max_shard_size="1GB")
    single = out / "model.safetensors"
    flip(single)
    before = contents(out)
    with pytest.raises(FileError, match=r"model.safetensors would be loaded in place of the result"):
        merge(*folders, out, overwrite=True)
    assert contents(out) == before
    single.rename(tmp_path / single.name)
    merge(*folders, out, overwrite=True)
    shutil.copy(tmp_path / single.name, single)
    before = contents(out)
    for overwrite in (False, True):
        with pytest.raises(FileError, match="would be loaded in place"):
            merge(*folders, out, overwrite=overwrite)
    assert contents(out) == before

    def meanwhile(*args):
        shutil.copy(tmp_path / single.name, single)
        return write(*args)

    write = pipeline.Pipeline.write
    monkeypatch.setattr(pipeline.Pipeline, "write", meanwhile)
    single.unlink()
    with pytest.raises(FileError, match="would be loaded in place"):
        merge(*folders, out, scale=0.5, overwrite=True)
    single.unlink()
    assert merge(*folders, out, scale=0.5, overwrite=True).kept_files == 3


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
def test_a_state_that_no_merge_wrote_is_none(folders, tmp_path, monkeypatch, name, placing):
    out = tmp_path / "out"
    (tmp_path / "mine").write_bytes(b"mine")
    break_off(monkeypatch, *folders, out)
    state = out / staging.STAGE / staging.STATE
    content = {**json.loads(state.read_text()), "placing": placing, **CRAFTED[name]}
    del content["seal"]
    staging.write_sealed(state, {key: value for key, value in content.items() if value is not None})
    assert merge(*folders, out).kept_files == 0
    assert (tmp_path / "mine").read_bytes() == b"mine"
    merge(*folders, tmp_path / "anew")
    assert contents(out) == contents(tmp_path / "anew")


def test_nothing_is_read_from_where_it_writes(folders, tmp_path):
    base, adapter = folders
    for out in (base, adapter):
        before = contents(out)
        with pytest.raises(FileError, match="is read"):
            merge(base, adapter, out, overwrite=True)
        assert contents(out) == before


def test_a_base_that_changes_while_it_is_read_is_noticed(own, monkeypatch):
    base, adapter, out = own
    write = pipeline.Pipeline.write

    def changing(*args):
        flip(next(base.glob("*1-of*.safetensors")))
        return write(*args)

    monkeypatch.setattr(pipeline.Pipeline, "write", changing)
    with pytest.raises(FileError, match="changed while"):
        merge(base, adapter, out)
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("last", [3, 4, 7])
def test_ctrl_c_at_any_moment_ends_the_writing_before_the_file_is_closed(folders, tmp_path, monkeypatch, last):
    submit, write, close = ThreadPoolExecutor.submit, pipeline._write, pipeline.SafetensorsWriter.close
    count, events = 0, []

    def stopping(self, *args):
        nonlocal count
        count += self._thread_name_prefix.startswith("merge")
        future = submit(self, *args)
        if count == last:
            raise KeyboardInterrupt
        return future

    def slow(*args):
        time.sleep(0.2)
        events.append("written")
        write(*args)

    def closed(self):
        close(self)
        events.append("closed")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", stopping)
    monkeypatch.setattr(pipeline, "_write", slow)
    monkeypatch.setattr(pipeline.SafetensorsWriter, "close", closed)
    with pytest.raises(KeyboardInterrupt):
        merge(*folders, tmp_path / "out")
    assert events[-1] == "closed" and not list((tmp_path / "out").rglob("*.part"))


def test_each_step_of_the_placing_is_on_the_disk_before_the_next(folders, tmp_path, monkeypatch):
    """In the order in which a disk may forget them: what is renamed or deleted lasts once its folder is flushed."""
    out, events = tmp_path / "new" / "out", []
    merge(*folders, out)
    shutil.rmtree(out)

    def told(module, name):
        real = getattr(module, name)

        def call(*arguments, **how):
            paths = [Path(each) for each in arguments if not isinstance(each, int)]
            if all(path.is_absolute() for path in paths):  # rmtree has names below an open folder
                events.append((name, *(path.relative_to(tmp_path / "new").as_posix() for path in paths)))
            return real(*arguments, **how)

        monkeypatch.setattr(module, name, call)

    told(staging, "flush")
    told(os, "replace")
    told(os, "unlink")
    told(os, "mkdir")
    merge(*folders, out)
    assert events.index(("flush", ".")) == events.index(("mkdir", "out")) + 1
    events.clear()
    merge(*folders, out, scale=0.5, overwrite=True)
    stage = f"out/{staging.STAGE}"
    states = [
        n for n, event in enumerate(events) if event == ("replace", f"{stage}/.state.json.new", f"{stage}/.state.json")
    ]
    assert all(events[n + 1] == ("flush", stage) for n in states)
    placing = events[states[-1] + 2 :]
    assert placing[:2] == [("unlink", "out/config.json"), ("flush", "out")]
    manifest = placing.index(("replace", f"{stage}/merge.json", "out/merge.json"))
    config = placing.index(("replace", f"{stage}/config.json", "out/config.json"))
    assert placing[manifest + 1 : config + 2] == [
        ("flush", "out"),
        ("replace", f"{stage}/config.json", "out/config.json"),
        ("flush", "out"),
    ]


def test_a_full_disk_is_one_sentence_and_the_merge_goes_on_when_there_is_room(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real, count = os.pwritev, 0

    def full(*args):
        nonlocal count
        count += 1
        if count > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full)
        with pytest.raises(JobError, match=r"out cannot be written: the disk is full.*MiB are free"):
            merge(*folders, out)
    assert not list(out.rglob("*.part"))
    assert merge(*folders, out).kept_files > 0
    assert load_file(next(out.glob("*.safetensors")))


def test_too_little_space_is_told_before_anything_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("gralora_ext.checkpoint.merging.free_bytes", lambda folder: 1000)
    with pytest.raises(JobError, match="needs .* MiB, and its disk has"):
        merge(*folders, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == [staging.STATE]


def test_a_folder_that_cannot_be_written_is_one_sentence(folders, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(JobError, match="out cannot be written: Read-only file system"):
        merge(*folders, tmp_path / "out")


def test_two_at_once_do_not_share_a_folder(folders, tmp_path):
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(JobError, match="in use"):
        merge(*folders, out)
    os.close(handle)
