# SPDX-License-Identifier: Apache-2.0
"""One run: what decides its numbers, its name, and how much work it is. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

START_UNITS = 20  # starting a process and loading the model, beside the forward passes of a row
STEP_UNITS = 3  # a training row: its forward pass, and a backward of twice the work

PROGRESS = "@progress"  # a line of a run's output that says how many units are done


def digest_of(values: Any) -> str:
    """Short, for a file's name: of what decides the numbers in it."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


CHOOSE, MEASURE = "choose", "measure"  # a run's part: on the validation rows, or on the test rows
CHOOSING_SEED = 1_000_003  # of the runs on validation rows: none of those that are measured


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison have in common. ``model`` is None for the default one."""

    model: str | None
    model_name: str
    model_files: str | None  # a digest of what lies at `model`
    rank: int
    steps: int
    batch_size: int
    max_length: int
    dtype: str
    threads: int | None
    texts: dict[str, Any]
    digests: dict[str, str]  # of the texts that a run of each part reads

    def in_words(self) -> dict[str, Any]:
        """For people: neither a path nor a digest, nor a rank, which a run may have of its own."""
        common = {k: getattr(self, k) for k in ("steps", "batch_size", "max_length", "dtype")}
        return {"model": self.model_name, **self.texts, **common}

    def held_out_rows(self, part: str) -> int:
        return self.texts["validation_rows" if part == CHOOSE else "test_rows"]


@dataclass(frozen=True)
class Run:
    """A run of ``method`` in a ``part``; ``extra`` names what is measured of the trained model beside its losses."""

    method: str
    kind: str
    part: str
    rate: float | None
    seed: int
    rank: int
    adapter: dict[str, Any]
    settings: Settings
    extra: str | None = None

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the numbers, and nothing else: no path, and no count of what another part reads."""
        common = asdict(self.settings)
        digests = common.pop("digests")
        for name in ("model", "model_files", "rank"):  # of a path the name stays; the run has a rank of its own
            del common[name]
        texts = common.pop("texts")
        names = {key: texts[key] for key in ("data", "general_text")}
        own = {key: value for key, value in asdict(self).items() if key != "settings"}
        return {**own, **common, **names, "rows": digests[self.part]}

    @property
    def digest(self) -> str:
        values = {**self.decisive, "model": self.settings.model}
        if self.settings.model_files is not None:
            values["model_files"] = self.settings.model_files
        return digest_of(values)

    @property
    def name(self) -> str:
        """For people, and for the file; the digest tells apart what the words do not."""
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        seed = "" if self.part == CHOOSE or self.kind == "base" else f"-seed{self.seed}"
        rank = f"-r{self.rank}" if self.kind == "adapter" else ""
        return f"{self.method}{rank}-{self.part}{rate}{seed}.{self.digest}"

    @property
    def units(self) -> int:
        """Its work, in forward passes of a row."""
        general = self.settings.texts["general_texts"] if self.part == MEASURE else 0
        training = 0 if self.kind == "base" else self.settings.steps * self.settings.batch_size * STEP_UNITS
        return START_UNITS + training + self.settings.held_out_rows(self.part) + general

    def words(self) -> str:
        """The run in a line of progress."""
        where = "choosing the learning rate" if self.part == CHOOSE else f"seed {self.seed}"
        rate = "" if self.rate is None else f", lr {self.rate:g}"
        return f"{self.method}{f' r {self.rank}' if self.kind == 'adapter' else ''}{rate}, {where}"
