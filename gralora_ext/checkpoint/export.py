# SPDX-License-Identifier: Apache-2.0
"""A GraLoRA adapter's files as those of a LoRA, which PEFT, vLLM and others know."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch

from .. import lora_factors
from ..lora_factors import Factors
from ..program.errors import FileError, first_sentence
from .adapter import Adapter, Layer
from .adapter_config import CONFIG, WEIGHTS
from .new_folder import new_folder
from .pieces import copy_tensor, write_tensor
from .safetensors_file import NAMES_OF_DTYPES, TORCH_DTYPES, SafetensorsWriter

SERVED_RANKS = {"vllm": (8, 16, 32, 64, 128, 256, 320, 512)}
_COPIED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "modules_to_save"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "ensure_weight_tying"),
)
_BIASES = {"none": "none", "all": "all", "gralora_only": "lora_only"}


class ExportedLayer(NamedTuple):
    """What a layer has become.

    Attributes:
        name: of the module.
        exact_rank: k·r + h.
        rank: of the LoRA in the file.
        error: ``‖ΔW - LoRA‖ / ‖ΔW‖`` in Frobenius' norm; 0 where the LoRA is exact.
    """

    name: str
    exact_rank: int
    rank: int
    error: float


@dataclass(frozen=True)
class LoraExport:
    """What :func:`export_lora` wrote.

    Attributes:
        layers: each with its rank and error.
        notes: sentences on what the reader of the files should know.
    """

    layers: list[ExportedLayer]
    notes: list[str] = field(default_factory=list)


class _Planned(NamedTuple):
    layer: Layer
    exact_rank: int
    kept: int  # the rank of the approximation, exact_rank where it is none
    rank: int  # that of the file, with zeros behind what is kept
    is_scaled: bool  # whether the scaling is multiplied into lora_B
    dtype: torch.dtype


def export_lora(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    serve_for: str | None = None,
) -> LoraExport:
    """Writes a GraLoRA adapter as a LoRA adapter, from its files alone.

    Without ``rank`` the LoRA is exact: ``ΔW = s · lora_B · lora_A`` of rank k·r + h with the adapter's own elements, bit for bit, lora_A
    nonzero only in its input block and lora_B only in its output block. lora_alpha is s times the rank, so that LoRA's scaling is s.
    Layers that differ in rank or scaling are in rank_pattern and alpha_pattern. Copies of modules (modules_to_save) and trained biases
    are carried over.

    Args:
        adapter: the folder of a GraLoRA adapter.
        out: a new or empty folder. It is complete when it has adapter_config.json.
        rank: layers of a larger exact rank get the nearest LoRA of this one, by the singular values of the factors, in float32.
        serve_for: ``"vllm"``: one rank for all layers, the smallest of 8, 16, 32, 64, 128, 256, 320 and 512 that holds the largest of
            them, with zeros behind; layers beyond 512 are truncated, which the notes tell. The scaling is multiplied into lora_B, in
            float32, and lora_alpha is r.

    Raises:
        ValueError: ``rank`` is not positive, or none of those that are served; or there is no such ``serve_for``.
        FileError: a file is not as it must be, the folder is not free, or the adapter has what is not served.
    """
    check_arguments(rank, serve_for)
    with Adapter(Path(adapter).expanduser()) as opened:
        if opened.kind != "GRALORA":
            raise FileError(
                f"{opened.folder / CONFIG}: peft_type is {opened.kind}: expected a GRALORA adapter to export"
            )
        if serve_for and (opened.whole or opened.config.get("modules_to_save")):
            what = next(iter(opened.whole), "modules_to_save")
            raise FileError(
                f"{opened.folder} has weights beside its layers' adapters ({what}), which {serve_for} does not serve with a LoRA: "
                "merge the adapter into its base with `gralora-ext merge`"
            )
        if not opened.layers:
            raise FileError(f"{opened.file.path} holds no layer with a GraLoRA adapter: expected one or more to export")
        plan = _planned(opened, rank, serve_for)
        with new_folder(Path(out)) as folder:
            _write_config(opened, plan, folder, serve_for)
            layers = _write_weights(opened, plan, folder / WEIGHTS)
            opened.file.check_unchanged()
    return LoraExport(layers, _notes(layers, rank, serve_for))


def check_arguments(rank: int | None, serve_for: str | None) -> None:
    """Raises the ValueError of :func:`export_lora` where these are not as it takes them."""
    if serve_for is not None and serve_for not in SERVED_RANKS:
        raise ValueError(f"serve_for: expected one of {', '.join(SERVED_RANKS)}, got {serve_for!r}")
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: expected a positive integer, got {rank!r}")
    if serve_for and rank not in SERVED_RANKS[serve_for]:
        served = ", ".join(map(str, SERVED_RANKS[serve_for]))
        raise ValueError(f"rank: expected one that {serve_for} serves ({served}), got {rank}")


def _planned(opened: Adapter, rank: int | None, serve_for: str | None) -> list[_Planned]:
    exact = {name: layer.k * layer.r + layer.h for name, layer in opened.layers.items()}
    served = None
    if serve_for:
        served = rank or next(
            (r for r in SERVED_RANKS[serve_for] if r >= max(exact.values())), SERVED_RANKS[serve_for][-1]
        )
    plan = []
    for name, layer in opened.layers.items():
        kept = min(exact[name], served or rank or exact[name])
        dtype = reduce(torch.promote_types, (TORCH_DTYPES[info.dtype] for info in layer.parts.values()))
        if kept < exact[name] or served:  # its elements are computed, and float32 keeps them
            dtype = torch.promote_types(dtype, torch.float32)
        plan.append(_Planned(layer, exact[name], kept, served or kept, served is not None, dtype))
    return plan


def _write_config(opened: Adapter, plan: list[_Planned], folder: Path, serve_for: str | None) -> None:
    from peft import LoraConfig

    from ..tuner.patterns import common_and_others

    given, file = opened.config, opened.folder / CONFIG
    bias = str(given.get("bias", "none"))
    if bias not in _BIASES:
        raise FileError(f"{file}: bias: expected one of {', '.join(_BIASES)}, got {bias[:60]!r}")
    r, rank_pattern = common_and_others({p.layer.name: p.rank for p in plan})
    alpha, alpha_pattern = common_and_others({p.layer.name: _alpha(p) for p in plan})
    fields = {name: given[name] for name in _COPIED if given.get(name) is not None}
    try:
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            target_modules=given.get("target_modules") or list(opened.layers),
            bias="none" if serve_for else _BIASES[bias],  # what is served has no tensors beside those of its layers
            lora_dropout=given.get("gralora_dropout") or 0.0,
            **fields,
        )
    except (TypeError, ValueError) as error:
        raise FileError(f"{file} has what LoRA's configuration refuses: {first_sentence(error)}") from error
    for name in ("target_modules", "exclude_modules"):  # in an order that is the same each time
        if isinstance(getattr(config, name), set):
            setattr(config, name, sorted(getattr(config, name)))
    config.save_pretrained(str(folder))


def _alpha(planned: _Planned) -> float:
    alpha = planned.rank * (1.0 if planned.is_scaled else planned.layer.scaling)
    return int(alpha) if alpha.is_integer() else alpha


def _write_weights(opened: Adapter, plan: list[_Planned], path: Path) -> list[ExportedLayer]:
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for p in plan:
        dtype = NAMES_OF_DTYPES[p.dtype]
        tensors += [
            (_name(p, "A"), dtype, (p.rank, p.layer.in_features)),
            (_name(p, "B"), dtype, (p.layer.out_features, p.rank)),
        ]
    tensors += [(info.name, info.dtype, info.shape) for info in opened.whole.values()]
    layers = []
    with closing(SafetensorsWriter(path, tensors, {"format": "pt"})) as file:
        for p in plan:
            factors, error = _factors(p)
            for letter, tensor in zip("AB", factors, strict=True):
                write_tensor(file, _name(p, letter), tensor)
            layers.append(ExportedLayer(p.layer.name, p.exact_rank, p.rank, error))
        for info in opened.whole.values():
            copy_tensor(opened.file, info.name, file)
        file.finish()
    return layers


def _factors(planned: _Planned) -> tuple[Factors, float]:
    """The two factors as they are written, and the relative error of their product."""
    layer = planned.layer
    read = {part: layer.file.read(info.name).to(planned.dtype) for part, info in layer.parts.items()}
    tensors = read["A"], read["B"], read.get("A_general"), read.get("B_general")
    error = 0.0
    if planned.kept == planned.exact_rank:
        factors = lora_factors.exact(*tensors)
    else:
        try:
            parts = lora_factors.decompose(*tensors)
        except ValueError as problem:
            raise FileError(f"{layer.file.path}: layer {layer.name}: {problem}") from None
        factors, error = parts.factors(planned.kept), parts.error(planned.kept)
    scaling = layer.scaling if planned.is_scaled else 1.0
    return lora_factors.padded(lora_factors.scaled(factors, scaling, planned.dtype), planned.rank), error


def _name(planned: _Planned, letter: str) -> str:
    return f"base_model.model.{planned.layer.name}.lora_{letter}.weight"


def _notes(layers: list[ExportedLayer], rank: int | None, serve_for: str | None) -> list[str]:
    cut = [layer for layer in layers if layer.rank < layer.exact_rank]
    if not serve_for or rank or not cut:
        return []
    largest_rank, largest_error = max(layer.exact_rank for layer in cut), max(layer.error for layer in cut)
    note = (
        f"k·r + hybrid_r is up to {largest_rank}, and {serve_for} serves ranks up to {SERVED_RANKS[serve_for][-1]}: {len(cut)} of "
        f"{len(layers)} layers are truncated to it, with relative errors up to {largest_error:.1e}"
    )
    return [note]
