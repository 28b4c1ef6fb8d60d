# SPDX-License-Identifier: Apache-2.0
"""Where a resumed job goes on: the newest whole checkpoint, if it was made with the same settings from the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from ..program.errors import JobError
from .checkpoints import STATE, Checkpoints, History, step_of
from .option_table import OPTIONS


def find(checkpoints: Checkpoints, state: dict[str, Any], data: str, how: str) -> tuple[Path, int, History] | None:
    """The checkpoint, the steps that it has behind it, and what happened in them; None where there is no checkpoint.

    ``state`` is what this job writes into its own checkpoints; ``how`` is the command that goes on with the old settings.
    """
    checkpoint = checkpoints.newest_whole()
    if checkpoint is None:
        return None
    then = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    # What there was no option for was done in one way then.
    missing = {n: o.in_old_jobs for n, o in OPTIONS.items() if n not in then["settings"] and not o.free}
    old = {**missing, **then["settings"]}
    new = {**dict.fromkeys(missing), **state["settings"]}
    other = [n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n)]
    how = " ".join([how, *(f"--{OPTIONS[n].name} {missing[n]}" for n in other if missing.get(n) is not None)])
    if other:
        differences = (f"--{n.replace('_', '-')} {old.get(n)} (now {new.get(n)})" for n in other)
        _refuse(checkpoint, ", ".join(differences), f"`{how}`")
    if then["data_digest"] != state["data_digest"]:
        _refuse(checkpoint, f"other rows than {data} has now", f"`{how}`")
    checkpoints.adopt(checkpoint)
    return checkpoint, step_of(checkpoint), History(then["history"])


def _refuse(checkpoint: Path, difference: str, how: str) -> NoReturn:
    raise JobError(f"--resume: {checkpoint} was made with {difference}; go on with {how}, or leave out --resume")
