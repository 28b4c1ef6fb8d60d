# SPDX-License-Identifier: Apache-2.0
"""The folder ``checkpoints`` of a job: which one a resumed job goes on from, and which are deleted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..program.errors import JobError
from ..program.files import Owner
from . import manifest
from .manifest import Damaged

MANIFEST = "manifest.json"  # written last: a checkpoint without it is not whole
STATE = "gralora_ext.json"  # the job's own part of a checkpoint: settings, data, history
# What going on exactly takes; without any one of these transformers goes on all the same, with
# other losses.
NEEDED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "scheduler.pt",
    "trainer_state.json",
    STATE,
)
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")


class History:
    """What has happened so far; it lives in the checkpoint, so that a resumed job tells the whole story."""

    def __init__(self, values: dict[str, Any] | None = None):
        values = values or {}
        self.losses: list[dict[str, float | None]] = values.get("losses", [])
        self.eval_losses: list[dict[str, float | None]] = values.get("eval_losses", [])
        self.samples: list[dict[str, str]] = values.get("samples", [])
        self.tokens: int = values.get("tokens", 0)
        self.seconds: float = values.get("seconds", 0.0)

    def eval_loss(self, step: int) -> float | None:
        return next((e["loss"] for e in self.eval_losses if e["step"] == step), None)


class Checkpoints(Owner):
    """A checkpoint is renamed into ``folder`` whole, with a manifest; the newest ``keep`` of a run stay.

    What no manifest lists is not the job's: it is neither read, nor deleted, nor overwritten.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], keep: int = 2):
        super().__init__(say)
        self.folder = folder
        self.keep = keep
        self.before_clear: Callable[[], None] | None = None  # called once, when this run has a checkpoint
        self._ours: set[str] = set()

    def newest_whole(self) -> Path | None:
        """The newest checkpoint that is as it was written; each newer one that is not is named, with what is wrong.

        None where there is no checkpoint at all; that there are some, and none is whole, is a JobError.
        """
        found, fault = self._all(), ""
        for path in found:
            try:
                manifest.check(path, MANIFEST, NEEDED)
                manifest.check_names(path, MANIFEST, _needed_of(path))
                return path
            except Damaged as error:
                older = " (older versions of gralora_ext wrote none)" if f"{error}" == f"{MANIFEST} is missing" else ""
                self.say(f"--resume: {path} is damaged and left aside: {error}{older}")
                fault = fault or f"{path.name}: {error}{older}"
        if found:
            raise JobError(
                f"--resume: no checkpoint in {self.folder} is whole ({fault}): put one back from a copy, "
                "or leave out --resume to start anew from the first step"
            )
        return None

    def newest(self) -> Path | None:
        """The newest checkpoint that a job wrote, whole or not."""
        return next((path for path in self._all() if self._written(path)), None)

    def bytes(self) -> int:
        """What the checkpoints take that are there."""
        files = (path / name for path in self._all() for name in self._written(path))
        return sum(file.stat().st_size for file in files if file.is_file())

    def last_of_run(self) -> Path | None:
        """The newest checkpoint that this run wrote or went on from."""
        return max((self.folder / name for name in self._ours), key=step_of, default=None)

    def adopt(self, checkpoint: Path) -> None:
        """The job goes on from this one: it belongs to the run, and is not cleared as an earlier run's."""
        self._ours.add(checkpoint.name)

    def seal(self, checkpoint: Path) -> None:
        """Writes the manifest of a checkpoint that is complete but for it."""
        manifest.write(checkpoint / MANIFEST, checkpoint.name, manifest.describe(checkpoint, checkpoint))

    def clear(self, newest: str) -> None:
        """Keeps the newest ones of this run; those of an earlier run have been superseded."""
        if self.before_clear is not None:
            self.before_clear()
            self.before_clear = None
        self._ours.add(newest)
        self._ours = {path.name for path in sorted(map(Path, self._ours), key=step_of)[-self.keep :]}
        for path in sorted(self.folder.iterdir()):
            if path.name in self._ours or path.name.startswith("."):  # what is staged, and the like
                continue
            written = self._written(path) if _NAME.fullmatch(path.name) and not path.is_symlink() else []
            if written:
                manifest.remove(path, written)
            if not written or path.exists():
                self.kept(path)

    def owns(self, path: Path) -> bool:
        checkpoint = self.folder / path.relative_to(self.folder).parts[0]
        return path.relative_to(checkpoint).as_posix() in self._written(checkpoint)

    def _written(self, checkpoint: Path) -> list[str]:
        """What the job wrote into a checkpoint, the manifest last; nothing where the manifest does not tell."""
        try:
            return [*manifest.read(checkpoint / MANIFEST)[1], MANIFEST]
        except Damaged:
            return []

    def _all(self) -> list[Path]:
        """All checkpoints, whole or not, the newest first."""
        return sorted((p for p in self.folder.glob("*") if _NAME.fullmatch(p.name)), key=step_of, reverse=True)


def _needed_of(checkpoint: Path) -> list[str]:
    """What the processes that wrote a checkpoint needed beside :data:`NEEDED`."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    count = state.get("processes", 1)
    random = ["rng_state.pth"] if count == 1 else [f"rng_state_{rank}.pth" for rank in range(count)]
    return [*random, "latest" if state.get("engine") == "deepspeed" else "optimizer.pt"]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])
