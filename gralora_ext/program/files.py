# SPDX-License-Identifier: Apache-2.0
"""Writing so that a crash, a full disk or a signal never leaves half a file: beside, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import filecmp
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import JobError
from .resources import disk_failure
from .signals import stopper

PARTIAL = ".partial-"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"  # the one folder below an output folder into which is staged too
_OLD = ".old"


class Owner:
    """Says which of the files that are already there a job may replace or delete, and tells what it left."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self._told: set[Path] = set()

    def owns(self, path: Path) -> bool:
        """Whether the file ``path`` is one that a job wrote."""
        raise NotImplementedError

    def kept(self, path: Path) -> None:
        if path not in self._told:
            self._told.add(path)
            self.say(f"kept, since no job wrote it, or it was changed since: {path}")


@contextmanager
def staged(folder: Path, owner: Owner | None = None, last: str = "") -> Iterator[Path]:
    """Yields an empty folder inside ``folder``; what lies in it at the end moves into ``folder``, replacing its equals.

    The file named ``last`` moves when all others are in their places, on the disk. What ``owner`` does not own is not
    replaced: it stays where it is, or, where its name is needed, gets another one. Without an owner all is replaced. On an
    error before the first move ``folder`` is as before; after one in between, each name in it is whole, old or new. What is
    still staged is removed. Failures of the disk become JobError.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
        try:
            with disk_errors(folder, stage):
                yield stage
            _flush_tree(stage)
            with stopper.held():
                for item in sorted(stage.iterdir(), key=lambda item: (item.name == last, item.name)):
                    if item.name == last:
                        flush(folder)
                    _replace(item, folder / item.name, stage, owner)
                flush(folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Makes this process the only one that writes into ``folder``, and clears what a killed one left staged there.

    The system frees the lock when the process dies. Without ``wait`` a folder in use is a JobError.
    """
    with ExitStack() as stack:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / LOCK, "w"))
        _lock(file.fileno(), folder, wait=wait)
        clear_stages(folder)
        yield


def check_unlocked(folder: Path) -> None:
    """JobError where another process has the lock of :func:`locked`; nothing is written."""
    with suppress(FileNotFoundError), open(folder / LOCK) as file:
        _lock(file.fileno(), folder, wait=False)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """As :func:`locked` without ``wait``, but without a file for the lock, and without clearing anything."""
    with disk_errors(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with disk_errors(folder):
            _lock(handle, folder, wait=False)
        yield
    finally:
        os.close(handle)


def _lock(file: int, folder: Path, *, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise JobError(f"{folder} is in use by another gralora-ext job: wait for it, or name another folder") from None
    except OSError:
        pass  # some network file systems have no locks: the user then sees to it that jobs do not share a folder


def clear_stages(folder: Path) -> None:
    """Removes what a killed process left staged in a folder that is this process's alone."""
    for stage in [*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{CHECKPOINTS}/{PARTIAL}*")]:
        for old in stage.glob(f"*{_OLD}"):  # its successor was about to be put into its place
            place = stage.parent / old.name.removesuffix(_OLD)
            if not os.path.lexists(place):
                old.rename(place)
        shutil.rmtree(stage, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON; the caller stages. JSON has no NaN and no infinity: those are ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


@contextmanager
def disk_errors(folder: Path, written: Path | None = None) -> Iterator[None]:
    """A full disk is an OSError, torch's RuntimeError, or an exception of a Rust library: all become JobError.

    Files are being written into ``written``; without it, any OSError is one of ``folder``.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, JobError):
            raise
        reason = disk_failure(error, written)
        if reason is None and isinstance(error, OSError) and error.errno not in (None, errno.ENOMEM):
            reason = error.strerror
        if reason is None:
            raise
        raise JobError(f"{folder} cannot be written: {reason}{_space_left(folder)}") from error


def free_bytes(folder: Path) -> int:
    """What is free on the disk of ``folder``, which need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _space_left(folder: Path) -> str:
    return f" ({free_bytes(folder) / 2**20:,.0f} MiB are free on its disk)"


def put_aside(path: Path) -> Path:
    """Gives what is at ``path`` another name beside it, which is returned."""
    return path.rename(_free_name(path))


def _replace(new: Path, final: Path, stage: Path, owner: Owner | None) -> None:
    if owner is not None and os.path.lexists(final):
        _keep_foreign(new, final, owner)
    if not final.is_dir() or final.is_symlink():
        os.replace(new, final)
        return
    old = stage / f"{final.name}{_OLD}"
    final.rename(old)  # a folder cannot be renamed over one that has files in it
    try:
        os.replace(new, final)
    except OSError:
        old.rename(final)
        raise


def _keep_foreign(new: Path, final: Path, owner: Owner) -> None:
    """What is not the owner's at ``final`` is in ``new`` too afterwards, or beside ``final`` where its name is taken.

    Nothing is moved out of the folder ``final``, so that whatever ends the process leaves it as it was.
    """
    if final.is_symlink() or not (final.is_dir() and new.is_dir()):
        if not _same_bytes(new, final) and (final.is_symlink() or not owner.owns(final)):
            owner.kept(put_aside(final))
        return
    files = [p for p in sorted(final.rglob("*")) if p.is_symlink() or not p.is_dir()]
    foreign = [p for p in files if p.is_symlink() or not owner.owns(p)]
    if len(foreign) == len(files) and any(os.path.lexists(new / p.relative_to(final)) for p in foreign):
        owner.kept(put_aside(final))  # a folder of another job, of which no file is to be mixed with the new ones
        return
    for path in foreign:
        name = path.relative_to(final)
        copy = _free_name(new / name) if os.path.lexists(new / name) else new / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        _link(path, copy)
        owner.kept(final / copy.relative_to(new))


def _link(path: Path, copy: Path) -> None:
    if path.is_symlink():
        copy.symlink_to(os.readlink(path))
        return
    try:
        os.link(path, copy)
    except OSError:  # some file systems have no hard links
        shutil.copy2(path, copy)


def _free_name(path: Path) -> Path:
    """A name beside ``path`` that nothing has: with .kept at its end, and a number where that is taken."""
    numbers = (path.with_name(f"{path.name}.kept{n or ''}") for n in itertools.count())
    return next(p for p in numbers if not os.path.lexists(p))


def _same_bytes(new: Path, old: Path) -> bool:
    return new.is_file() and old.is_file() and not old.is_symlink() and filecmp.cmp(new, old, shallow=False)


def _flush_tree(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)  # safetensors lets only the owner read its files
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
