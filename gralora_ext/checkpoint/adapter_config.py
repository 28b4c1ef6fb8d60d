# SPDX-License-Identifier: Apache-2.0
"""An adapter's configuration, checked: of which kind it is, and what it says of single layers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..program.errors import FileError
from . import match_names
from .json_text import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("GRALORA", "LORA")
# Fields of LoraConfig (PEFT 0.19 to 0.21) with which the merged weight is not W + s B A, or W is
# not the base model's as it is stored.
_NOT_PLAIN = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Beginnings of init_lora_weights with which training starts by changing the base model's weights
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What matching a pattern's keys may take of a processor and of memory. It takes half a second for
# a thousand layers with a key each.
_SECONDS, _BYTES = 10, 512 << 20


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in an adapter's folder, not checked yet."""
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder: expected an adapter's, with {CONFIG} and {WEIGHTS}")
    return read_object(folder / CONFIG)


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Raises a FileError where adapters of this configuration cannot be taken from their files alone."""
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise FileError(f"{path}: peft_type: expected GRALORA or LORA, got {str(kind)[:60]!r}")
    if "gralora_alpha" in config:
        raise FileError(
            f"{path} is that of the method's own repository (it has gralora_alpha), whose r counts otherwise: convert it first "
            "with `gralora-ext import-official`"
        )
    for field in ("trainable_token_indices", *(_NOT_PLAIN if kind == "LORA" else ())):
        if config.get(field):
            raise FileError(
                f"{path}: {field} is set, and such an adapter cannot be merged in files: load the model with PEFT and merge it there"
            )
    if kind == "LORA":
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise FileError(
                f"{path}: init_lora_weights is {start[:60]!r}, which changes the base model too: save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion, and merge that"
            )


def values_of_layers(path: Path, field: str, pattern: object, layers: list[str]) -> dict[str, Any]:
    """What ``rank_pattern``, ``alpha_pattern`` or ``k_pattern`` says of each of the ``layers`` of which it says anything.

    It is the value of the first key that matches the end of the layer's name, as PEFT takes it.
    """
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise FileError(f"{path}: {field}: expected names of layers with numbers, got {str(pattern)[:60]!r}")
    for key, value in pattern.items():
        if not is_number(value) or value <= 0:
            raise FileError(f"{path}: {field}: expected a positive number for {key[:60]!r}, got {str(value)[:60]}")
    if not pattern:
        return {}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", match_names.__file__, str(_SECONDS), str(_BYTES)],
            input=json.dumps([list(pattern), layers]),
            capture_output=True,
            text=True,
            check=True,
        )
    except subprocess.CalledProcessError:
        raise FileError(
            f"{path}: {field}: its keys take more than {_SECONDS} s or {_BYTES >> 20} MiB to match: "
            "expected names of layers, or simple regular expressions for them"
        ) from None
    found = json.loads(done.stdout)
    if isinstance(found, dict):
        key, reason = found["key"], found["reason"]
        raise FileError(f"{path}: {field}: {key[:60]!r} is no name and no regular expression: {reason}")
    values = list(pattern.values())
    return {layer: values[place] for layer, place in zip(layers, found, strict=True) if place is not None}


def is_number(value: object) -> bool:
    """Whether it is a finite number, and not a truth value."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False
