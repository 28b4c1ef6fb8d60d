# SPDX-License-Identifier: Apache-2.0
"""Models of our configuration, for the tests of it."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.gralora.layer import GraloraLayer
from tuner_helpers import Mlp

from gralora_ext import GraloraConfig

FIELDS = {"r": 12, "alpha": 24, "gralora_k": 2, "target_modules": ["first", "second"], "init_weights": False}
# A use of each field that PEFT's GraLoRA lacks
USED = {
    "rank_pattern": {"first": 8},
    "alpha_pattern": {"first": 6},
    "k_pattern": {"first": 4},
    "use_rslora": True,
    "exclude_modules": ["third"],
    "trainable_token_indices": [1, 2],
    "ensure_weight_tying": True,
    "init_weights": "gaussian",
}


def built(base: Any = Mlp, seed: int = 0, config: type = GraloraConfig, **fields: Any) -> PeftModel:
    torch.manual_seed(seed)
    model = base().double()
    torch.manual_seed(seed + 1)
    return get_peft_model(model, config(**{**FIELDS, **fields}))


def layers(model: PeftModel) -> dict[str, GraloraLayer]:
    found = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, GraloraLayer)}
    assert found
    return found
