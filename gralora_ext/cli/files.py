"""Writing so that a crash, a full disk or a signal never leaves half a file: beside, flushed to disk, then renamed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .errors import JobError, first_sentence
from .signals import stopper

PARTIAL = ".partial-"
LOCK = ".lock"
# What torch (inline_container) and the Rust libraries behind safetensors and tokenizers say when the disk fails them.
_DISK_MARKS = ("inline_container", "os error 28", "os error 27", "os error 5)")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields an empty folder inside ``folder``; what lies in it at the end moves into ``folder``, replacing its equals.

    On any error the staged work is removed and ``folder`` is as before. Failures of the disk become JobError.
    """
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
        try:
            yield stage
            _flush_tree(stage)
            with stopper.held():
                for item in sorted(stage.iterdir()):
                    _replace(item, folder / item.name, stage)
                _flush(folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Makes this process the only one that writes into ``folder``, and clears what a killed one left staged there.

    The system frees the lock when the process dies. Without ``wait`` a folder in use is a JobError.
    """
    with ExitStack() as stack:
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / LOCK, "w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise JobError(
                f"{folder} is in use by another gralora-ext job: wait for it, or name another folder"
            ) from None
        except OSError:
            pass  # some network file systems have no locks: the user then sees to it that jobs do not share a folder
        for path in list(folder.rglob(f"{PARTIAL}*")):
            shutil.rmtree(path, ignore_errors=True)
        yield


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON; the caller stages."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A full disk is an OSError, or torch's RuntimeError, or an exception of a Rust library: all become JobError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, JobError) or not (
            (isinstance(error, OSError) and error.errno) or any(mark in str(error) for mark in _DISK_MARKS)
        ):
            raise
        reason = getattr(error, "strerror", None) or first_sentence(error, 120)
        raise JobError(f"{folder} cannot be written: {reason}{_space_left(folder)}") from error


def free_bytes(folder: Path) -> int:
    """What is free on the disk of ``folder``, which need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _space_left(folder: Path) -> str:
    return f" ({free_bytes(folder) / 2**20:,.0f} MiB are free on its disk)"


def _replace(new: Path, final: Path, stage: Path) -> None:
    if final.is_dir() and not final.is_symlink():
        final.rename(stage / f"{final.name}.old")  # a folder cannot be renamed over one that has files in it
    os.replace(new, final)


def _flush_tree(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)  # safetensors lets only the owner read its files
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
