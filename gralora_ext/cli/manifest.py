# SPDX-License-Identifier: Apache-2.0
"""The list of a folder's files with their sizes and digests: whether the folder is whole, and what in it is the job's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..program.files import write_json


class Damaged(Exception):
    """What is wrong with a folder or its manifest, as the end of a sentence: `optimizer.pt is missing`."""


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()


def describe(path: Path, root: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of the file ``path``, or of every file below the folder ``path``, by their names below ``root``."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}


def write(path: Path, name: str, files: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest ``path`` of what is called ``name``. It holds a digest of itself too."""
    content = {"name": name, "files": files}
    write_json(path, {**content, "sha256": _own_digest(content)})


def read(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The name and the files that the manifest ``path`` lists; Damaged where it is not as it was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = content.pop("sha256")
        if own != _own_digest(content) or not all(map(_is_below, content["files"])):
            raise ValueError
        return content["name"], content["files"]
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{path.name} is damaged") from None


def check(folder: Path, manifest: str, needed: Iterable[str]) -> None:
    """Damaged unless each file that the manifest lists is as it was written, and ``needed`` are among them."""
    name, files = read(folder / manifest)
    if name != folder.name:
        raise Damaged(f"{manifest} is the one of {name}")
    check_names(folder, manifest, needed)
    for file, entry in files.items():
        fault = _fault(folder / file, entry)
        if fault:
            raise Damaged(f"{file} {fault}")


def check_names(folder: Path, manifest: str, needed: Iterable[str]) -> None:
    """Damaged unless the manifest lists ``needed``."""
    files = read(folder / manifest)[1]
    for name in needed:
        if name not in files:
            raise Damaged(f"{manifest} does not list {name}")


def is_as_written(path: Path, entry: dict[str, Any]) -> bool:
    """Whether ``path`` is a file, and still the one that ``entry`` describes."""
    return not path.is_symlink() and _fault(path, entry) is None


def remove(folder: Path, names: Iterable[str]) -> None:
    """Deletes the files ``names`` below ``folder`` in their order, then the folders that this leaves empty.

    ``folder`` itself is deleted too where nothing is left in it. What lies behind a symbolic link is not deleted: it is
    not below ``folder``.
    """
    parents = {folder}
    for name in names:
        path = folder / name
        between = [p for p in path.parents if folder in p.parents]
        if not any(p.is_symlink() for p in between):
            path.unlink(missing_ok=True)
            parents.update(between)
    for parent in sorted(parents, key=lambda p: len(p.parts), reverse=True):
        try:
            parent.rmdir()
        except OSError:
            pass  # something else is in it, or it is gone


def _fault(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if not path.is_file():
            return "is not a file"
        if size != entry["bytes"]:
            return f"has {size:,} bytes in place of {entry['bytes']:,}"
        if digest(path) != entry["sha256"]:
            return "has another content (SHA-256) than when it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _own_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_below(name: str) -> bool:
    """Whether ``name`` leads into the manifest's folder and not out of it: what it lists may be deleted one day."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and os.sep * 2 not in name
