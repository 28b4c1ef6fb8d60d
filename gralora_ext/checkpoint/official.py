# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the paper's own repository (SqueezeBits/GraLoRA), as PEFT reads them.

The tensors are the same and have the same names. The words of the configuration are others: there r counts the hybrid ranks too, so that
PEFT's r is r - hybrid_r; alpha is called gralora_alpha. The scaling is alpha / r there and alpha / (r + hybrid_r) in PEFT: the same number.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..program.errors import FileError, first_sentence
from .adapter import Adapter, weights_of
from .adapter_config import CONFIG, WEIGHTS, read_config
from .new_folder import new_folder
from .pieces import copy_tensor
from .safetensors_file import SafetensorsFile, SafetensorsWriter

_SAME = (
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "hybrid_r",
    "target_modules",
    "gralora_dropout",
    "gralora_k",
    "fan_in_fan_out",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)
_OTHERS = ("peft_type", "r", "gralora_alpha", "bias")
_BIASES = ("none", "all", "gralora_only")


@dataclass(frozen=True)
class Import:
    """What :func:`import_official` wrote.

    Attributes:
        layers: how many layers have an adapter.
        r: of PEFT's configuration, without the hybrid ranks.
        hybrid_r: of both.
        alpha: of PEFT's configuration; the scaling is ``alpha / (r + hybrid_r)``.
        notes: sentences on what the user should know.
    """

    layers: int
    r: int
    hybrid_r: int
    alpha: float
    notes: list[str] = field(default_factory=list)


def import_official(adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> Import:
    """Writes a checkpoint of SqueezeBits/GraLoRA as one of PEFT's GraLoRA, which computes the same.

    Args:
        adapter: the folder of the checkpoint, with adapter_config.json and adapter_model.safetensors.
        out: a new or empty folder. It is complete when it has adapter_config.json.

    Raises:
        FileError: a file is not as that repository writes it, or the folder is not free.
    """
    folder = Path(adapter).expanduser()
    given = read_config(folder)
    fields, notes = _translated(folder / CONFIG, given)
    _check_ranks(folder, fields["r"])
    with Adapter(folder, {**fields, "peft_type": "GRALORA"}) as opened:
        if not opened.layers:
            raise FileError(f"{opened.file.path} holds no layer with a GraLoRA adapter: expected one or more to import")
        with new_folder(Path(out)) as new:
            _write_config(folder / CONFIG, fields, new)
            tensors = [(info.name, info.dtype, info.shape) for info in opened.file.tensors.values()]
            with closing(SafetensorsWriter(new / WEIGHTS, tensors, {"format": "pt"})) as file:
                for name in opened.file.tensors:
                    copy_tensor(opened.file, name, file)
                file.finish()
            opened.file.check_unchanged()
        return Import(len(opened.layers), fields["r"], fields["hybrid_r"], fields["alpha"], notes)


def _translated(path: Path, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of PEFT's configuration, and notes."""
    if given.get("peft_type") != "GRALORA" or "gralora_alpha" not in given:
        has = "gralora_alpha" if "gralora_alpha" in given else "no gralora_alpha"
        raise FileError(
            f"{path} is not that of a checkpoint of SqueezeBits/GraLoRA: expected peft_type 'GRALORA' and gralora_alpha, got "
            f"{str(given.get('peft_type'))[:60]!r} and {has}"
        )
    unknown = [name for name, value in given.items() if value and name not in (*_SAME, *_OTHERS)]
    if unknown:
        raise FileError(
            f"{path} has {unknown[0][:60]!r}, which a checkpoint of SqueezeBits/GraLoRA does not have: its meaning is unknown"
        )
    r, h, k = given.get("r", 8), given.get("hybrid_r", 0), given.get("gralora_k", 2)
    if not all(type(value) is int for value in (r, h, k)) or not 0 <= h < r or k < 1 or (r - h) % k:
        raise FileError(
            f"{path}: expected whole r > hybrid_r >= 0, and r - hybrid_r divisible by gralora_k, got r {str(r)[:60]}, hybrid_r "
            f"{str(h)[:60]} and gralora_k {str(k)[:60]}"
        )
    bias = str(given.get("bias", "none"))
    if bias not in _BIASES:
        raise FileError(f"{path}: bias: expected one of {', '.join(_BIASES)}, got {bias[:60]!r}")
    notes = []
    if bias != "none":
        notes.append(
            f"the training changed biases (bias is '{bias}'), which that repository does not save: they are those of the base model, "
            "as they are when it loads the checkpoint itself"
        )
    same = {name: given[name] for name in _SAME if given.get(name) is not None}
    return {**same, "r": r - h, "hybrid_r": h, "gralora_k": k, "alpha": given["gralora_alpha"], "bias": "none"}, notes


def _check_ranks(folder: Path, ranks: int) -> None:
    """Refuses tensors of another r in the repository's words; :class:`Adapter` would speak of PEFT's r."""
    with SafetensorsFile(weights_of(folder)) as file:
        for name, info in file.tensors.items():
            if name.endswith(".gralora_A") and info.shape[2:] != (ranks,):
                raise FileError(
                    f"{file.path}: expected gralora_A [k, N/k, r - hybrid_r], whose last size is {ranks}, got {name} with shape "
                    f"{list(info.shape)}"
                )


def _write_config(path: Path, fields: dict[str, Any], folder: Path) -> None:
    from peft import GraloraConfig

    try:
        config = GraloraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise FileError(f"{path} has what PEFT's configuration refuses: {first_sentence(error)}") from error
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file each time
    config.save_pretrained(str(folder))
