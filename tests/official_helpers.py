# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as the paper's own repository (SqueezeBits/GraLoRA) writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

TARGETS = ("q_proj", "k_proj", "up_proj", "down_proj")


def official_config(base: Path, **fields: Any) -> dict[str, Any]:
    """adapter_config.json as that repository writes it: all fields of its GraloraConfig and of the PEFT of its day."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "gralora_alpha": 20,
        "gralora_dropout": 0.05,
        "gralora_k": 2,
        "hybrid_r": 0,
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "GRALORA",
        "r": 8,
        "revision": None,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
        **fields,
    }


def make(folder: Path, base: Path, **fields: Any) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A checkpoint with random tensors, its configuration and its tensors."""
    config = official_config(base, **fields)
    torch.manual_seed(3)
    r, h, k, tensors = config["r"], config["hybrid_r"], config["gralora_k"], {}
    for name, module in AutoModelForCausalLM.from_pretrained(base).named_modules():
        if isinstance(module, nn.Linear) and name.endswith(TARGETS):
            N, M, key = module.in_features, module.out_features, f"base_model.model.{name}"
            tensors[f"{key}.gralora_A"] = 0.3 * torch.randn(k, N // k, r - h)
            tensors[f"{key}.gralora_B"] = 0.3 * torch.randn(k, r - h, M // k)
            if h:
                tensors[f"{key}.gralora_A_general.weight"] = 0.3 * torch.randn(h, N)
                tensors[f"{key}.gralora_B_general.weight"] = 0.3 * torch.randn(M, h)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, config, tensors
