# SPDX-License-Identifier: Apache-2.0
"""What training and evaluation are given: examples, or packs of them, and how a batch is made of those."""

from __future__ import annotations

import argparse
import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .data import Encoder, Example
from .gather import Gathered
from .model import check_vocabulary
from .options import bits_of
from .packing import Packed, check, packs
from .source import Source


@dataclass
class Batches:
    """``items`` are what an epoch goes through: examples, or groups of them; ``collate`` makes a batch of some.

    ``digest`` is the SHA-256 of all tokens and labels.
    """

    items: list[Any]
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    rows: int
    held_out: list[Example]
    digest: str


def make_batches(
    rows: Gathered,
    encoder: Encoder,
    model: Any,
    source: Source,
    options: argparse.Namespace,
    device: str,
    say: Callable[[str], None],
) -> Batches:
    """Makes tokens of all rows and says what was cut or left out; JobError where they do not fit the model.

    With ``--packing`` the model is tried, on ``device``, and stays there.
    """
    o = options
    examples, remarks = encoder.examples(rows.train, "training")
    held_out, remarks_held_out = encoder.examples(rows.held_out, "held-out")
    for text in remarks + remarks_held_out:
        say(text)
    known = check_vocabulary(model, source, [*examples, *held_out])
    if encoder.pad >= known:  # some tokenizers have a token for it that the model lacks
        encoder.pad = 0  # any will do: no position reads padding, and it has no label
    digest = _digest([*examples, *held_out])
    if not o.packing:
        return Batches(examples, encoder.collate, len(examples), held_out, digest)
    check(model if bits_of(o) else model.to(device), examples, o.attn_implementation, bits_of(o))
    groups = packs(examples, o.max_length)
    full = sum(len(e["input_ids"]) for e in examples) / (len(groups) * o.max_length)
    say(f"packing: {len(examples):,} rows in {len(groups):,} packs of {o.max_length} tokens, {full:.0%} full")
    return Batches(groups, Packed().collate, len(examples), held_out, digest)


def _digest(examples: list[Example]) -> str:
    found = hashlib.sha256()
    for example in examples:
        for name in ("input_ids", "labels"):
            numbers = array("q", example[name])
            found.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
    return found.hexdigest()
