# SPDX-License-Identifier: Apache-2.0
"""What a job tells at its end: its figures for metrics.json, and the same in words."""

from __future__ import annotations

import math
from typing import Any

from .checkpoints import History
from .report import versions


def metrics(
    history: History,
    *,
    steps: int,
    rows_per_step: int,
    items: int,
    train_rows: int,
    diverged: str | None,
    merged: dict[str, float] | None,
    **facts: Any,
) -> dict[str, Any]:
    """The figures of a job of ``steps`` steps over ``items`` rows, or packs of rows.

    A loss that is not a finite number, or was not measured, is None.
    """
    before, after = history.eval_loss(0), history.eval_loss(steps)
    return {
        "steps": steps,
        "epochs": steps / math.ceil(items / rows_per_step),  # the last step of each takes what is left
        "train_rows": train_rows,
        "diverged": diverged,
        "eval_loss_before": before,
        "eval_loss_after": after,
        "eval_loss_fall": None if before is None or after is None else before - after,
        "losses": history.losses,
        "eval_losses": history.eval_losses,
        "tokens": history.tokens,
        "train_seconds": history.seconds,
        "tokens_per_second": history.tokens / history.seconds if history.seconds else None,
        "merged_logits": merged,
        "samples": history.samples,
        "versions": versions(),
        **facts,
    }


def in_words(values: dict[str, Any]) -> str:
    """The held-out loss before and after, the speed and the memory, in one line."""

    def loss(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    speed = "" if values["tokens_per_second"] is None else f"{values['tokens_per_second']:,.0f} tokens/s, "
    return (
        f"held-out loss {loss(values['eval_loss_before'])} -> {loss(values['eval_loss_after'])} in {values['steps']} "
        f"steps, {speed}{values['peak_memory_mib']['host']:,.0f} MiB at most"
    )


def samples(values: dict[str, Any]) -> str:
    """Question, answer before and after, and the right one, of each sample."""
    texts = []
    for sample in values["samples"]:
        text = ""
        for name, what in (("Question", "prompt"), ("before",) * 2, ("after",) * 2, ("reference",) * 2):
            text += f"\n{name}: ".ljust(12) + sample[what].replace("\n", "\n" + " " * 11)
        texts.append(text + "\n")
    return "".join(texts)
