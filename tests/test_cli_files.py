# SPDX-License-Identifier: Apache-2.0
"""Nothing half-written: staging, a failing disk, two jobs in one folder; and the order in which signals are obeyed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import environment

from gralora_ext.program.errors import JobError
from gralora_ext.program.files import locked, staged
from gralora_ext.program.resources import disk_failure, memory_failure


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_staged_work_replaces_files_and_folders_at_its_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("1")
    (tmp_path / "f").write_text("2")
    (tmp_path / "other").write_text("3")
    with staged(tmp_path) as stage:
        (stage / "a").mkdir()
        (stage / "a" / "new").write_text("4")
        (stage / "f").write_text("5")
        assert {"a/old": "1", "f": "2"}.items() <= tree(tmp_path).items()
    assert tree(tmp_path) == {"a/new": "4", "f": "5", "other": "3"}
    assert {p.name for p in tmp_path.iterdir()} == {"a", "f", "other"}


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_failed_work_leaves_the_folder_as_it_was(tmp_path, error):
    (tmp_path / "f").write_text("1")
    with pytest.raises(type(error)), staged(tmp_path) as stage:
        (stage / "f").write_text("2")
        raise error
    assert tree(tmp_path) == {"f": "1"} and len(list(tmp_path.iterdir())) == 1


def write_full_device(kind: str) -> None:
    if kind == "python":
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)
    elif kind == "torch":  # inline_container
        torch.save(torch.zeros(100_000), "/dev/full")
    elif kind == "torch, small":  # basic_ios::clear: it fails only where the file is closed
        torch.save(torch.zeros(10), "/dev/full")
    elif kind == "torch, into a file":
        with open("/dev/full", "wb", buffering=0) as file:
            torch.save(torch.zeros(100_000), file)
    elif kind == "torch, without zip":
        torch.save(torch.zeros(100_000), "/dev/full", _use_new_zipfile_serialization=False)
    else:
        from tokenizers import Tokenizer, models

        Tokenizer(models.BPE({f"t{i}": i for i in range(9999)}, [])).save("/dev/full")


KINDS = ["python", "torch", "torch, small", "torch, into a file", "torch, without zip", "tokenizers"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
@pytest.mark.parametrize("kind", KINDS)
def test_full_disk_is_called_that_whoever_writes(tmp_path, kind):
    with pytest.raises(JobError, match="cannot be written: .*full.* MiB are free") as error, staged(tmp_path):
        write_full_device(kind)
    assert str(tmp_path) in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_full_disk_below_the_standard_output_is_one_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "gralora_ext", "--version"]
        result = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "standard output or a file: the disk is full (No space left on device)" in result.stderr


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full (No space left on device)"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
        (OSError(errno.EFBIG, "x"), "File too large"),
        (RuntimeError("write(): fd 3 failed with No space left on device"), "the disk is full"),
        (ValueError("I/O error: Disk quota exceeded (os error 122)"), "Disk quota exceeded"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "as where it is full"),
        (RuntimeError("basic_ios::clear: iostream error"), "as where it is full"),
        (caused(ValueError("not saved"), by=OSError(errno.ENOSPC, "x")), "the disk is full"),
    ],
)
def test_failure_of_the_disk_is_told_from_its_error(tmp_path, error, says):
    assert says in disk_failure(error, tmp_path)
    assert disk_failure(ValueError("x"), tmp_path) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.00 GiB more were asked for"),
    ],
)
def test_failure_of_the_memory_is_told_from_its_error(error, says):
    assert says in memory_failure(error)
    assert memory_failure(ValueError("x")) is None


def test_torchs_own_failure_of_memory_tells_how_much_was_asked_for():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory_failure(error.value) == "out of memory: 1,099,511,627,776 MiB more were asked for at once"


def test_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(JobError, match=f"cannot be written: {os.strerror(errno.ENOTDIR)}"),
        staged(tmp_path / "file" / "x"),
    ):
        pass


def test_second_job_in_a_folder_is_refused_and_leftovers_are_cleared(tmp_path):
    (tmp_path / ".partial-dead").mkdir()
    with locked(tmp_path, wait=False):
        assert not (tmp_path / ".partial-dead").exists()
        with pytest.raises(JobError, match="is in use by another gralora-ext job"), locked(tmp_path, wait=False):
            pass


HELD = """
import os, signal, sys, time
from gralora_ext.program.errors import Stopped
from gralora_ext.program.signals import stopper
stopper.install()
try:
    with stopper.held():
        for signum in map(int, sys.argv[1:]):
            os.kill(os.getpid(), signum)
        time.sleep(0.1)
        print("held to its end", flush=True)
    print("not reached")
except Stopped as stop:
    print("stopped by", stop.name)
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(
    ("signals", "code", "out"),
    [
        ([signal.SIGTERM], 143, "held to its end\nstopped by SIGTERM\n"),
        ([signal.SIGTERM, signal.SIGINT], 130, ""),
    ],
)
def test_first_signal_waits_for_held_work_and_the_second_does_not(signals, code, out):
    command = [sys.executable, "-c", HELD, *(str(int(s)) for s in signals)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (code, out), result.stderr


def test_a_folder_that_cannot_be_put_into_its_place_leaves_the_old_one_there(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("1")

    def failing(source, target):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(JobError, match="cannot be written: Input/output error"), staged(tmp_path) as stage:
        (stage / "a").mkdir()
        (stage / "a" / "new").write_text("2")
        monkeypatch.setattr(os, "replace", failing)
    assert tree(tmp_path) == {"a/old": "1"}
