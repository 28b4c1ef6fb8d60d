# SPDX-License-Identifier: Apache-2.0
"""The folder that a command makes an adapter in: whole, or no adapter's at all, and never in the place of somebody's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..program.errors import FileError
from ..program.files import PARTIAL, alone_in, clear_stages, disk_errors, staged
from .adapter_config import CONFIG


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder inside ``out`` whose files move into ``out`` at the end; on any error nothing of them is left.

    ``adapter_config.json`` comes last, without which no program takes ``out`` for an adapter's. A folder that is there stays the
    same one, with its owner and its rights.

    Raises:
        FileError: ``out`` is not the name of a new or an empty folder.
        JobError: it cannot be written, or another process writes into it.
    """
    folder = out.expanduser()
    with disk_errors(folder):
        is_new = not folder.exists()
        if not is_new and not folder.is_dir():
            raise FileError(f"{out} is not a folder: expected a new or empty one")
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone_in(folder):
            _check_free(folder)
            clear_stages(folder)
            with staged(folder, last=CONFIG) as stage:
                yield stage
                _check_free(folder)
    except BaseException:
        if is_new:
            with suppress(OSError):  # somebody has put something into it
                folder.rmdir()
        raise


def _check_free(folder: Path) -> None:
    """Nothing is in the folder but what this command has staged, or one that was killed."""
    inside = next((path for path in folder.iterdir() if not path.name.startswith(PARTIAL)), None)
    if inside is not None:
        raise FileError(f"{folder} holds other files ({inside.name}): expected a new or empty folder")
