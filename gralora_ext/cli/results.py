# SPDX-License-Identifier: Apache-2.0
"""What a finished job leaves: sample answers, the adapter, the merged model (proved equal), and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..program.errors import JobError
from .data import Encoder
from .model import DTYPES

# ‖difference‖ / ‖logits‖ between merged and adapter + base. In float32 merging rounds each weight
# once more, and sums run in another order: at most 1e-6 was measured, of 14 to 210 adapted layers.
# In bfloat16 each activation is rounded anew as well, by 1.7e-3 in norm: errors of some hundred
# roundings add up in squares, to 2.5e-2 at most where it was measured. An adapter may change logits
# by less than that, so there each layer's merged weight is looked at too.
MERGED_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}
# How far from 1 the share of its adapter may be that a layer's merged weight holds, see
# `_Weights.share`: 0 without the adapter, 2 with it twice, -1 with the wrong sign. A right merge
# differs from 1 only by the few weights whose sum lies next to a tie.
SHARE_TOLERANCE = 0.05
ROWS = 64  # of a weight, evenly spaced: some of each block, and all columns


def answers(model: Any, tokenizer: Any, encoder: Encoder, asked: list[list[int]], tokens: int) -> list[str]:
    """The model's greedy answers to prompts of tokens, at most ``tokens`` long; what leaves no room is cut at its beginning."""
    from transformers import GenerationConfig

    positions = getattr(model.config, "max_position_embeddings", None) or 2**31
    if not asked:
        return []
    starts = [start[-min(encoder.max_length, positions - 1) :] for start in asked]
    width = max(map(len, starts))
    device = next(model.parameters()).device
    ids = torch.tensor([[encoder.pad] * (width - len(s)) + s for s in starts], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in starts], device=device)
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    config = GenerationConfig(
        max_new_tokens=min(tokens, positions - width),
        do_sample=False,
        pad_token_id=encoder.pad,
        eos_token_id=sorted(ends) or None,
        use_cache=True,
    )
    was_training = model.training
    model.eval()
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    model.train(was_training)
    return [tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in made]


class _Weights:
    """Some rows of a layer's weight before its adapters are merged into it, and as they must be then."""

    def __init__(self, layer: Any) -> None:
        weight = layer.get_base_layer().weight
        self.rows = torch.linspace(0, weight.shape[0] - 1, min(ROWS, weight.shape[0])).long().to(weight.device)
        self.before = weight.detach()[self.rows].double()
        delta = sum(layer.get_delta_weight(name).detach()[self.rows].double() for name in layer.active_adapters)
        self.change = (self.before + delta).to(weight.dtype).double() - self.before

    def share(self, merged: torch.Tensor) -> float:
        """How much of the adapter ``merged`` holds, ⟨merged - before, change⟩ / ‖change‖²; 1 where it changes nothing."""
        size = self.change.square().sum()
        found = merged.detach()[self.rows.to(merged.device)].to(self.change) - self.before
        return ((found * self.change).sum() / size).item() if size > 0 else 1.0


def write_merged(
    model: Any, tokenizer: Any, batch: dict[str, torch.Tensor], dtype: str, folder: Path
) -> dict[str, float]:
    """Merges the adapter into ``model`` (which is used up), saves it, and loads it again with stock transformers.

    Returns how far its logits on ``batch`` are from those of adapter + base: ``max_difference``, ``max_logit``, and
    ``relative``, the difference in norm. One that rounding does not explain is a JobError, and so is a layer whose merged
    weight does not hold its adapter once.
    """
    from peft.tuners.gralora.layer import GraloraLayer
    from transformers import AutoModelForCausalLM

    def logits(m: Any) -> torch.Tensor:
        m.eval()
        with torch.no_grad():
            answer = m(input_ids=batch["input_ids"].to(m.device), attention_mask=batch["attention_mask"].to(m.device))
        return answer.logits[batch["attention_mask"].bool().to(m.device)].float()

    expected = logits(model)
    layers = {n: layer for n, layer in model.get_base_model().named_modules() if isinstance(layer, GraloraLayer)}
    weights = {name: _Weights(layer) for name, layer in layers.items()}
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).to(expected.device)
    kept = "only checkpoints were written; --no-merge writes the adapter without the merged model"
    for name, before in weights.items():
        share = before.share(loaded.get_submodule(name).weight)
        if not abs(share - 1) <= SHARE_TOLERANCE:
            raise JobError(
                f"the merged weight of {name} holds {share:.2f} of its adapter, where it must hold 1: {kept}"
            )
    difference, size = logits(loaded) - expected, expected.norm().item()
    relative = difference.norm().item() / size if size > 0 else difference.norm().item()
    if not relative <= MERGED_TOLERANCE[dtype]:
        raise JobError(
            f"the merged model's logits differ from adapter + base by {relative:.2e} of them, where rounding explains "
            f"{MERGED_TOLERANCE[dtype]:.0e}: {kept}"
        )
    return {
        "max_difference": difference.abs().max().item(),
        "max_logit": expected.abs().max().item(),
        "relative": relative,
    }
