# SPDX-License-Identifier: Apache-2.0
"""Where a resumed job goes on: the newest whole checkpoint, if it was made with the same settings from the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

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
    elsewhere = _known_by_content(then, state)
    other = [n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n) and n not in elsewhere]
    before, now = processes(then), processes(state)
    if before != now:
        _compare_processes(checkpoint, before, now, f"`{how}`")
        other = [n for n in other if n not in ("batch_size", "grad_accum")]
    how = " ".join([how, *(f"--{OPTIONS[n].name} {missing[n]}" for n in other if missing.get(n) is not None)])
    if other:
        differences = (f"--{n.replace('_', '-')} {old.get(n)} (now {new.get(n)})" for n in other)
        _refuse(checkpoint, ", ".join(differences), f"`{how}`")
    if then["data_digest"] != state["data_digest"]:
        _refuse(checkpoint, f"other rows than {data} has now", f"`{how}`")
    checkpoints.adopt(checkpoint)
    return checkpoint, step_of(checkpoint), History(then["history"])


def _known_by_content(then: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """Settings whose files may lie elsewhere than they did: what is in them is compared."""
    rows = ("data", "eval_data", "chat_template") if then["data_digest"] == now["data_digest"] else ()
    return (*rows, "model") if "weights_digest" in then else rows


def check_content(checkpoint: Path, tokens: str, weights: str) -> None:
    """That the same rows have become the same tokens, and that the base is the same, by these digests.

    Checkpoints of before they were noted are taken as they are.
    """
    then = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if then.get("tokens_digest", tokens) != tokens:
        raise JobError(
            f"--resume: {checkpoint} was made with other tokens of the same rows: the model's tokenizer or chat template "
            "has changed since, or the template puts today's date into a text; begin anew, without --resume"
        )
    if then.get("weights_digest", weights) != weights:
        raise JobError(
            f"--resume: {checkpoint} was made with other weights of the base: name the model that it was made with by "
            "--model, or begin anew, without --resume"
        )


class Processes(NamedTuple):
    """How many there are, how they share the model, and how many rows they take in a step together."""

    number: int
    engine: str
    rows: int


def processes(state: dict[str, Any]) -> Processes:
    """Of the job that wrote ``state``; those of before there were several had one."""
    count, settings = state.get("processes", 1), state["settings"]
    return Processes(count, state.get("engine", "ddp"), settings["batch_size"] * settings["grad_accum"] * count)


def _compare_processes(checkpoint: Path, before: Processes, now: Processes, how: str) -> None:
    """JobError unless these processes can read those' checkpoint (DeepSpeed's are its own), and take as many rows."""
    if "deepspeed" in (before.engine, now.engine) and before[:2] != now[:2]:
        was, is_now = (f"{p.number} processes with {p.engine}" for p in (before, now))
        _refuse(checkpoint, f"{was} (now {is_now}), and DeepSpeed's checkpoints are for as many as wrote them", how)
    if before.rows != now.rows:
        _refuse(
            checkpoint,
            f"{before.rows} rows a step (now {now.rows}: --batch-size x --grad-accum x {now.number} processes)",
            f"--batch-size and --grad-accum that make {before.rows}",
        )


def _refuse(checkpoint: Path, difference: str, how: str) -> NoReturn:
    raise JobError(f"--resume: {checkpoint} was made with {difference}; go on with {how}, or leave out --resume")
