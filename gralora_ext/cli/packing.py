# SPDX-License-Identifier: Apache-2.0
"""Several rows of data in one row of a batch, so that none of it is padding; they do not see each other."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

import torch

from ..program.errors import JobError
from .data import Example

# How far the logits of a row may change, in norm, when the row before it does. Nothing is to
# change but for the 8-bit products of bitsandbytes, which choose columns by all rows together.
_UNSEEN = 1e-3
_UNSEEN_8BIT = 5e-2


def packs(examples: list[Example], length: int) -> list[list[Example]]:
    """The examples in as few groups of at most ``length`` tokens as best fit, the longest first, finds."""
    groups: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # how many tokens a group has room for, and its number, sorted
    for example in sorted(examples, key=lambda e: -len(e["input_ids"])):
        size = len(example["input_ids"])
        place = bisect_left(room, (size, 0))
        free, number = room.pop(place) if place < len(room) else (length, len(groups))
        if number == len(groups):
            groups.append([])
        groups[number].append(example)
        insort(room, (free - size, number))
    return groups


class Packed:
    """Makes batches of groups: transformers' own, one sequence in which positions begin anew with each row."""

    def __init__(self) -> None:
        from transformers import DataCollatorWithFlattening

        self.flatten = DataCollatorWithFlattening()

    def collate(self, groups: list[list[Example]]) -> dict[str, torch.Tensor]:
        return self.flatten([example for group in groups for example in group])


def check(model: Any, examples: list[Example], attention: str | None, bits: int | None) -> None:
    """JobError where the tokens of one row see those of another in a batch of ``Packed``, or not their own positions."""
    rows = [{name: tokens[:16] for name, tokens in example.items()} for example in examples[:2]]
    size = model.get_input_embeddings().weight.shape[0]
    other = {**rows[0], "input_ids": [(token + 1) % size for token in rows[0]["input_ids"]]}
    start, was_training = len(rows[0]["input_ids"]), model.training
    model.eval()
    with torch.no_grad():
        first, second, alone = (
            model(**_inputs(batch, model.device), use_cache=False).logits[0].float()
            for batch in ([rows[0], rows[-1]], [other, rows[-1]], [rows[-1]])
        )
    model.train(was_training)
    first, second = first[start:], second[start:]
    tolerance = _UNSEEN_8BIT if bits == 8 else _UNSEEN
    rounding = 5e-2 if bits or model.dtype != torch.float32 else tolerance
    if _differ(first, second) > tolerance or _differ(first, alone) > rounding:
        how = f" with {attention} attention" if attention else ""
        raise JobError(
            f"--packing: in this model the tokens of one row see those of another{how}: leave out --packing, or try "
            "--attn-implementation sdpa or eager"
        )


def _inputs(batch: list[Example], device: Any) -> dict[str, torch.Tensor]:
    made = Packed().collate([batch])
    return {name: made[name].to(device) for name in ("input_ids", "position_ids")}


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    size = other.norm().item()
    return (one - other).norm().item() / size if size > 0 else 0.0
