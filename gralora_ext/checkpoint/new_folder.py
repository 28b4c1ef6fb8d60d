# SPDX-License-Identifier: Apache-2.0
"""The folder that a command makes: there as a whole, or not at all, and never in the place of somebody's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..program.errors import FileError
from ..program.files import staged


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside ``out`` that takes its place at the end; on any error nothing is left.

    Raises:
        FileError: ``out`` is not the name of a new or an empty folder, or the disk refuses.
    """
    final = out.expanduser().resolve()
    _check_free(final, out)
    with staged(final.parent) as stage:
        folder = stage / final.name
        folder.mkdir()
        yield folder
        _check_free(final, out)


def _check_free(final: Path, out: Path) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise FileError(f"{out} is not a folder: expected a new or empty one")
    inside = next(final.iterdir(), None)
    if inside is not None:
        raise FileError(f"{out} holds other files ({inside.name}): expected a new or empty folder")
