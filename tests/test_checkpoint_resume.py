# SPDX-License-Identifier: Apache-2.0
"""A merge that was broken off goes on, whatever broke it off."""

import errno
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
from resume_helpers import break_off, change_json, contents, flip
from safetensors.torch import load_file

from gralora_ext.checkpoint import merge, pipeline, sealed, staging
from gralora_ext.program.errors import FileError, JobError

PROGRAM = Path(__file__).with_name("killed_merge.py")


def killed(base, adapter, out, *how):
    command = [sys.executable, PROGRAM, base, adapter, out, *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return [(int(count), digest) for count, digest in map(str.split, lines)]


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_killed_before_any_call_it_writes_the_same_files(sharded, tmp_path, step):
    found = killed(*sharded, tmp_path / "out", "calls", str(step))
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


def test_goes_on_with_the_files_that_are_missing(sharded, tmp_path, monkeypatch):
    out = tmp_path / "out"
    break_off(monkeypatch, *sharded, out, after=1)
    assert [p.name for p in out.iterdir()] == [".gralora_ext-merge"]
    report = merge(*sharded, out)
    assert report.kept_files == 1 and len(report.files) > 2
    merge(*sharded, tmp_path / "unbroken")
    assert contents(out) == contents(tmp_path / "unbroken")


def test_a_repeated_merge_reads_no_weights(sharded, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge(*sharded, out)
    before = contents(out)
    real = staging.sha256_of
    for module in (staging, sealed):
        monkeypatch.setattr(module, "sha256_of", lambda path: {"config.json": real(path)}[path.name])
    monkeypatch.setattr(pipeline, "Pipeline", None)
    assert merge(*sharded, out).was_done
    assert contents(out) == before


def test_a_repeated_merge_of_copied_files_is_done_too(own_sharded):
    base, adapter, out = own_sharded
    merge(base, adapter, out)
    for path in (*base.iterdir(), *adapter.iterdir(), *out.iterdir()):
        os.utime(path)
    assert merge(base, adapter, out).was_done


def test_files_of_the_base_keep_their_content_whatever_their_names(own_sharded, monkeypatch):
    base, adapter, out = own_sharded
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


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("state", ["broken off", "done"])
def test_a_changed_input_is_noticed_and_nothing_is_lost(own_sharded, monkeypatch, name, state):
    base, adapter, out = own_sharded
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
def test_another_request_needs_overwrite_and_leaves_nothing_of_the_old_one(sharded, tmp_path, monkeypatch, state):
    out = tmp_path / "out"
    if state == "done":
        merge(*sharded, out)
        (out / "notes.txt").write_text("mine")
    else:
        break_off(monkeypatch, *sharded, out)
    before = contents(out)
    with pytest.raises(FileError, match=r"scale was 1\.0, and is 0\.5"):
        merge(*sharded, out, scale=0.5)
    assert contents(out) == before
    merge(*sharded, out, scale=0.5, max_shard_size="1GB", overwrite=True)
    merge(*sharded, tmp_path / "anew", scale=0.5, max_shard_size="1GB")
    expected = contents(tmp_path / "anew")
    assert "model.safetensors" in expected and "model.safetensors.index.json" not in expected
    assert contents(out) == {**expected, **({"notes.txt": b"mine"} if state == "done" else {})}


@pytest.mark.parametrize("lost", ["model-00001-of-00003.safetensors", "config.json", "tokenizer.json"])
def test_what_is_lost_after_the_last_rename_is_written_again(sharded, tmp_path, monkeypatch, lost):
    out = tmp_path / "out"

    def killed(path):
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(staging.shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            merge(*sharded, out)
    before = {name: data for name, data in contents(out).items() if not name.startswith(".")}
    (out / lost).unlink()
    merge(*sharded, out)
    assert contents(out) == before


def test_a_base_that_changes_while_it_is_read_is_noticed(own_sharded, monkeypatch):
    base, adapter, out = own_sharded
    write = pipeline.Pipeline.write

    def changing(*args):
        flip(next(base.glob("*1-of*.safetensors")))
        return write(*args)

    monkeypatch.setattr(pipeline.Pipeline, "write", changing)
    with pytest.raises(FileError, match="changed while"):
        merge(base, adapter, out)
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("last", [3, 4, 7])
def test_ctrl_c_at_any_moment_ends_the_writing_before_the_file_is_closed(sharded, tmp_path, monkeypatch, last):
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
        merge(*sharded, tmp_path / "out")
    assert events[-1] == "closed" and not list((tmp_path / "out").rglob("*.part"))


def test_each_step_of_the_placing_is_on_the_disk_before_the_next(sharded, tmp_path, monkeypatch):
    """In the order in which a disk may forget them: what is renamed or deleted lasts once its folder is flushed."""
    out, events = tmp_path / "new" / "out", []
    merge(*sharded, out)
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
    told(sealed, "flush")
    told(os, "replace")
    told(os, "unlink")
    told(os, "mkdir")
    merge(*sharded, out)
    assert events.index(("flush", ".")) == events.index(("mkdir", "out")) + 1
    events.clear()
    merge(*sharded, out, scale=0.5, overwrite=True)
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


def test_a_full_disk_is_one_sentence_and_the_merge_goes_on_when_there_is_room(sharded, tmp_path, monkeypatch):
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
            merge(*sharded, out)
    assert not list(out.rglob("*.part"))
    assert merge(*sharded, out).kept_files > 0
    assert load_file(next(out.glob("*.safetensors")))


def test_too_little_space_is_told_before_anything_is_written(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr("gralora_ext.checkpoint.merging.free_bytes", lambda folder: 1000)
    with pytest.raises(JobError, match="needs .* MiB, and its disk has"):
        merge(*sharded, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == [staging.STATE]


def test_a_folder_that_cannot_be_written_is_one_sentence(sharded, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(JobError, match="out cannot be written: Read-only file system"):
        merge(*sharded, tmp_path / "out")


def test_two_at_once_do_not_share_a_folder(sharded, tmp_path):
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(JobError, match="in use"):
        merge(*sharded, out)
    os.close(handle)
