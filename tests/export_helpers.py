# SPDX-License-Identifier: Apache-2.0
"""What an adapter in a folder computes, by PEFT, and what is written there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import gralora_ext

TOKENS = torch.arange(24).view(2, 12) * 7 % 96
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(base: Path, adapter: Path) -> Tensor:
    """What PEFT computes with the adapter; what it warns its users of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # of PEFT 0.19, where it is False
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def gralora_logits(base: Path, adapter: Path) -> Tensor:
    with gralora_ext.enable():
        return logits(base, adapter)


def assert_same_outputs(base: Path, adapter: Path, exported: Path) -> None:
    expected, plain = gralora_logits(base, adapter), AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits
    assert (expected - plain).abs().max() > 0.01, "the adapter changes nothing"
    torch.testing.assert_close(logits(base, exported), expected, rtol=1e-5, atol=1e-5)


def written(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
