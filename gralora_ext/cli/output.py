# SPDX-License-Identifier: Apache-2.0
"""The output folder: what a job wrote into it is on record there, so that nothing else is ever replaced or deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..program.files import Owner, staged
from . import manifest
from .manifest import Damaged

RECORD = ".written.json"


class Output(Owner):
    """A file belongs to the job while it is, byte by byte, the one that the record lists: what a user changed is his."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        super().__init__(say)
        self.folder = folder
        self.read()

    def read(self) -> None:
        """What is on record now."""
        try:
            self.files = manifest.read(self.folder / RECORD)[1]
        except Damaged:  # there was no job here, or one of an older version: nothing here is known to be a job's
            self.files = {}

    def owns(self, path: Path) -> bool:
        name = path.relative_to(self.folder).as_posix()
        return name == RECORD or (name in self.files and manifest.is_as_written(path, self.files[name]))

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """As :func:`files.staged`; what is staged, and no more, replaces the job's files, and the record tells of it."""
        with staged(self.folder, self) as stage:
            yield stage
            items = sorted(stage.iterdir())
            files = {n: e for n, e in self.files.items() if stage / n.split("/")[0] not in items}
            for item in items:
                files |= manifest.describe(item, stage)
            manifest.write(stage / RECORD, RECORD, files)
        self.files = files

    def remove(self, name: str) -> None:
        """Deletes what a job wrote into the folder ``name``; what else is in there stays, and is named."""
        place = self.folder / name
        if place.is_symlink() or not place.is_dir():
            return
        ours = [n for n in self.files if n.startswith(f"{name}/") and self.owns(self.folder / n)]
        manifest.remove(place, [n.removeprefix(f"{name}/") for n in ours])
        if place.exists():
            self.kept(place)
        files = {n: e for n, e in self.files.items() if not n.startswith(f"{name}/")}
        with staged(self.folder, self) as stage:
            manifest.write(stage / RECORD, RECORD, files)
        self.files = files
