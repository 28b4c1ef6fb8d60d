# SPDX-License-Identifier: Apache-2.0
"""The folder that a merge writes into: staged in a hidden folder inside it, and put in place when all of it is there.

``OUT/.gralora_ext-merge/`` has the files that are finished and ``.state.json``, which lists them; a killed merge goes on from there. When all
are there they are renamed into ``OUT``, ``config.json`` last, without which no program takes the folder for a model's. The manifest
``merge.json`` then lists inputs and outputs with their SHA-256: what it does not list, or was changed since, is not ours. It is never
touched but where the result has a file of its name, and then gets another name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from ..program.errors import FileError
from ..program.files import alone_in, disk_errors, flush, put_aside
from ..program.signals import stopper
from .base import CONFIG, INDEX, SINGLE
from .safetensors_file import stamp_of
from .sealed import is_as_written, read_sealed, sha256_of, write_sealed

# The state's name is hidden: no small file of a base has such a one, and is staged beside it.
STAGE, STATE, MANIFEST = ".gralora_ext-merge", ".state.json", "merge.json"
OVERWRITE = "give overwrite=True (--overwrite) to write it anew"


class Staging:
    """What is written into ``out`` for one ``request`` (what is asked for) and its ``inputs`` (path → bytes, stamp, sha256).

    ``outputs`` are the finished files (name → bytes, sha256). Made by :func:`opened`.
    """

    def __init__(self, out: Path, request: dict[str, Any], inputs: dict[str, dict[str, Any]]):
        self.out = out
        self.folder = out / STAGE
        self.request = request
        self.inputs = inputs
        self.outputs: dict[str, dict[str, Any]] = {}
        # What earlier merges wrote (name → bytes, stamp, sha256): in the end replaced, or taken away.
        self.theirs: dict[str, dict[str, Any]] = {}
        self.moved_aside: list[Path] = []
        self.placing = False
        self.is_done = False

    def finished(self, name: str, sha256: str) -> None:
        """``name`` lies in the stage, whole and flushed."""
        self.outputs[name] = {"bytes": (self.folder / name).stat().st_size, "sha256": sha256}
        self.save()

    def save(self) -> None:
        content = {"request": self.request, "inputs": self.inputs, "outputs": self.outputs}
        write_sealed(self.folder / STATE, {**content, "theirs": self.theirs, "placing": self.placing})

    def place(self, versions: dict[str, str]) -> None:
        """Renames all that is finished into the folder, takes away what it replaces, and ends the stage."""
        self.refuse_single(self.outputs)
        self.placing = True
        self.save()
        staged = [name for name in self.outputs if (self.folder / name).exists()]
        with stopper.held():
            if CONFIG in staged:  # until it is there again, nothing takes the folder for a model's
                self._clear(CONFIG)
                flush(self.out)
            for name in staged:
                if name != CONFIG:
                    _check_parents(self.out, name)
                    self._clear(name)
                    (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(self.folder / name, self.out / name)
            for name in self.theirs:
                if name not in self.outputs:
                    self._clear(name)
                    with suppress(OSError):  # other files are in it
                        os.removedirs((self.out / name).parent)
            for parent in {(self.out / name).parent for name in staged}:
                flush(parent)
            content = {"versions": versions, "request": self.request}
            write_sealed(
                self.folder / MANIFEST,
                {**content, "inputs": self.inputs, "outputs": dict(sorted(self.outputs.items()))},
            )
            if read_sealed(self.out / MANIFEST) is None:
                self._clear(MANIFEST)
            os.replace(self.folder / MANIFEST, self.out / MANIFEST)
            flush(self.out)
            if CONFIG in staged:
                os.replace(self.folder / CONFIG, self.out / CONFIG)
                flush(self.out)
            shutil.rmtree(self.folder)

    def refuse_single(self, names: Container[str]) -> None:
        """Nothing else in the folder may be loaded in place of the result, whose files have these names."""
        if INDEX in names and SINGLE not in self.theirs and os.path.lexists(self.out / SINGLE):
            raise FileError(
                f"{self.out / SINGLE} would be loaded in place of the result, which is in several files: move it, or name another "
                "folder"
            )

    def _clear(self, name: str) -> None:
        """Takes away what has this name in the folder: a merge's file, if nobody has touched it since, else it is moved aside."""
        path = self.out / name
        if not os.path.lexists(path):
            return
        if name in self.theirs and self.theirs[name]["stamp"] == list(stamp_of(path.lstat())):
            path.unlink()
        else:
            self.moved_aside.append(put_aside(path))


@contextmanager
def opened(
    out: Path, request: dict[str, Any], inputs: dict[str, dict[str, Any]], names: list[str], overwrite: bool
) -> Iterator[Staging]:
    """The folder's state for a request that will write files of these ``names``; it is this process's alone meanwhile.

    ``inputs`` get the SHA-256 that an earlier try has found, where they are as they were.

    Raises:
        FileError: the folder holds other files, another merge, or one of inputs that have changed since.
        JobError: it cannot be written, or another process writes into it.
    """
    with disk_errors(out):
        if not out.exists():
            out.mkdir(parents=True, exist_ok=True)
            flush(out.parent)
    with alone_in(out):
        staging = _examined(out, request, inputs, names, overwrite)
        with disk_errors(out):
            if staging.is_done:
                shutil.rmtree(staging.folder, ignore_errors=True)
            else:
                staging.folder.mkdir(exist_ok=True)
                staging.save()  # first: what is in place already must be in some list at any moment
                _clear_unfinished(staging)
            yield staging


def check(
    out: Path, request: dict[str, Any], inputs: dict[str, dict[str, Any]], names: list[str], overwrite: bool
) -> Staging:
    """What :func:`opened` raises and finds, with nothing written."""
    if not out.exists():
        return Staging(out, request, inputs)
    with alone_in(out):
        return _examined(out, request, inputs, names, overwrite)


def _examined(
    out: Path, request: dict[str, Any], inputs: dict[str, dict[str, Any]], names: list[str], overwrite: bool
) -> Staging:
    staging = Staging(out, request, inputs)
    done, pending = read_sealed(out / MANIFEST), read_sealed(staging.folder / STATE, "theirs", "placing")
    placing = bool(pending and pending["placing"])
    if done and not placing and _is_done(staging, done, overwrite):
        return staging
    ours = {MANIFEST, *(done["outputs"] if done else ())}
    if pending:
        ours |= {*pending["theirs"], *(pending["outputs"] if placing else ())}
        _take_up(staging, pending, overwrite)
    _refuse_foreign(out, [*names, MANIFEST], ours, begun=bool(pending or done))
    if done:
        _find_theirs(staging, done["outputs"], since=(out / MANIFEST).stat().st_ctime_ns)
    if pending:
        _find_theirs(staging, pending["theirs"])
    if pending and placing and not staging.outputs:  # those of another merge, which no manifest lists
        _find_theirs(staging, pending["outputs"])
    staging.refuse_single(names)
    return staging


def _clear_unfinished(staging: Staging) -> None:
    """Removes what was being written when a try was killed."""
    for path in staging.folder.rglob("*"):
        name = path.relative_to(staging.folder).as_posix()
        if name not in (STATE, *staging.outputs) and not path.is_dir():
            path.unlink()


def _is_done(staging: Staging, done: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds what is asked for: then nothing is left to do."""
    reason = _difference(staging, done)
    since = (staging.out / MANIFEST).stat().st_ctime_ns
    if not reason:
        for name, entry in done["outputs"].items():
            if not is_as_written(staging.out / name, entry, since):
                reason = f"its {name} is not as it was written"
    if reason and not overwrite:
        raise FileError(f"{staging.out} holds another merge: {reason}; {OVERWRITE}")
    if reason:
        return False
    staging.refuse_single(done["outputs"])
    staging.outputs, staging.is_done = done["outputs"], True
    return True


def _take_up(staging: Staging, pending: dict[str, Any], overwrite: bool) -> None:
    """Goes on with what an earlier try has finished; with ``overwrite``, only where it is the same merge."""
    reason = _difference(staging, pending)
    if reason and not overwrite:
        raise FileError(f"{staging.out} holds the beginning of another merge: {reason}; {OVERWRITE}")
    if reason:
        return
    staging.placing = pending["placing"]
    since = (staging.folder / STATE).stat().st_ctime_ns
    for name, entry in pending["outputs"].items():
        paths = [staging.folder / name, *([staging.out / name] if staging.placing else [])]
        if any(is_as_written(path, entry, since) for path in paths):
            staging.outputs[name] = entry
    for path, entry in staging.inputs.items():
        entry["sha256"] = pending["inputs"][path]["sha256"]


def _find_theirs(staging: Staging, entries: dict[str, dict[str, Any]], since: int = 0) -> None:
    """What an earlier merge has written, and nobody has changed since."""
    for name, entry in entries.items():
        path = staging.out / name
        _check_parents(staging.out, name)
        if name not in staging.theirs and is_as_written(path, entry, since):
            staging.theirs[name] = {**entry, "stamp": list(stamp_of(path.lstat()))}


def _difference(staging: Staging, earlier: dict[str, Any]) -> str:
    """What differs between what is asked for and an earlier try, as a clause; empty where nothing does."""
    for key, value in staging.request.items():
        if earlier["request"].get(key) != value:
            return f"{key} was {earlier['request'].get(key)!r}, and is {value!r} now"
    if earlier["inputs"].keys() != staging.inputs.keys():
        path = min(earlier["inputs"].keys() ^ staging.inputs.keys())
        return f"{path} {'is new' if path in staging.inputs else 'is gone'} since"
    for path, entry in staging.inputs.items():
        before = earlier["inputs"][path]
        if entry["stamp"] == before["stamp"]:
            continue
        if entry["bytes"] != before["bytes"] or before["sha256"] != sha256_of(Path(path)):
            return f"{path} was changed since"
    return ""


def _refuse_foreign(out: Path, names: list[str], ours: set[str], begun: bool) -> None:
    found = sorted(path.name for path in out.iterdir() if path.name != STAGE)
    if found and not begun:
        raise FileError(
            f"{out} holds other files ({found[0]}), and is not of an earlier merge: expected a new or empty folder"
        )
    for name in names:
        if os.path.lexists(out / name) and name not in ours:
            _refuse_in_the_way(out / name)
        _check_parents(out, name)


def _check_parents(out: Path, name: str) -> None:
    """The folders between ``out`` and the file of this name are folders, if they are there, and lead nowhere else."""
    for parent in list((out / name).parents)[: len(Path(name).parts) - 1]:
        if os.path.lexists(parent) and (parent.is_symlink() or not parent.is_dir()):
            _refuse_in_the_way(parent)


def _refuse_in_the_way(path: Path) -> NoReturn:
    raise FileError(f"{path} is in the way, and no merge wrote it: move it, or name another folder")
