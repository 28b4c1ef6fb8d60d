"""What a finished job leaves: sample answers, the adapter, the merged model (proved equal), and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .data import Encoder
from .errors import JobError
from .model import DTYPES

# The greatest difference between the logits of merged and adapter + base, over the greatest logit. Merging rounds each
# weight once more, and the sums run in another order: 1e-6 to 1e-5 in float32. In bfloat16 the rounding is as coarse as the
# weights themselves, so there the limit finds only a merge that went wrong.
MERGED_TOLERANCE = {"fp32": 1e-4, "bf16": 0.2}


def answers(model: Any, tokenizer: Any, encoder: Encoder, prompts: list[str], tokens: int) -> list[str]:
    """The model's greedy answers, at most ``tokens`` long; the beginning of a prompt that leaves no room is cut."""
    from transformers import GenerationConfig

    positions = getattr(model.config, "max_position_embeddings", None) or 2**31
    starts = [encoder.prompt(prompt)[-min(encoder.max_length, positions - 1) :] for prompt in prompts]
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


def write_merged(
    model: Any, tokenizer: Any, batch: dict[str, torch.Tensor], dtype: str, folder: Path
) -> dict[str, float]:
    """Merges the adapter into ``model`` (which is used up), saves it, and loads it again with stock transformers.

    Returns how far its logits on ``batch`` are from those of adapter + base: ``max_difference``, ``max_logit`` and their
    quotient ``relative``. A quotient that rounding does not explain is a JobError.
    """
    from transformers import AutoModelForCausalLM

    def logits(m: Any) -> torch.Tensor:
        m.eval()
        with torch.no_grad():
            answer = m(input_ids=batch["input_ids"].to(m.device), attention_mask=batch["attention_mask"].to(m.device))
        return answer.logits[batch["attention_mask"].bool().to(m.device)].float()

    expected = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).to(expected.device)
    difference, largest = (logits(loaded) - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= MERGED_TOLERANCE[dtype] * largest:
        raise JobError(
            f"the merged model's logits differ from adapter + base by {difference:.2e}, where the greatest is {largest:.2e}: "
            "only checkpoints were written; --no-merge writes the adapter without the merged model"
        )
    return {"max_difference": difference, "max_logit": largest, "relative": difference / largest if largest else 0.0}
