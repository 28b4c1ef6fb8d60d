# SPDX-License-Identifier: Apache-2.0
"""The adapter: the model fitted with it as the options say, and its weights loaded from a checkpoint."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..program.errors import JobError, first_sentence
from ..program.resources import memory_failure
from .option_table import OPTIONS
from .options import bits_of
from .source import Source, parse_targets

# Options that a configuration has under the same name; those that are at their defaults are left
# to it.
_SAME = (
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "k_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
)


def add_adapter(model: Any, source: Source, options: Any) -> Any:
    """Fits ``model`` with the adapter of ``options.backend``; returns the PeftModel, adapters in fp32.

    GraLoRA and LoRA get the same number of parameters and the same scale: LoRA's rank is r + hybrid_r. What PEFT
    refuses is a JobError.
    """
    import peft

    import gralora_ext

    fused = options.backend == "fused"
    try:
        # Our configuration has fields that only our layers know.
        with gralora_ext.enable() if fused else nullcontext():
            fitted = peft.get_peft_model(model, _config(model, options))
    except (ValueError, TypeError, IndexError, NotImplementedError, RuntimeError) as error:
        if memory_failure(error):
            raise
        raise JobError(f"the adapter does not fit {source.name}: {first_sentence(error)}") from error
    if fused:
        from peft.tuners.gralora.layer import GraloraLayer

        layers = [m for m in fitted.modules() if isinstance(m, GraloraLayer)]
        ours = sum(isinstance(m, gralora_ext.GraloraLinear) for m in layers)
        if ours != len(layers):
            raise JobError(f"only {ours} of the {len(layers)} layers are fused: use --backend peft, and report this")
    return fitted


def _config(model: Any, options: Any) -> Any:
    import peft
    from transformers.pytorch_utils import Conv1D

    targets = parse_targets(options.target_modules)
    layers = matched_layers(model, targets)
    if options.layers_to_transform is not None and isinstance(targets, str):
        if targets != "all-linear":
            raise JobError("--layers-to-transform needs names in --target-modules, and not a regular expression")
        targets = sorted({name.rsplit(".", 1)[-1] for name, _ in layers})  # PEFT would adapt all blocks
    _check_saved(model, options.modules_to_save or [])
    same = {name: getattr(options, name) for name in _SAME if getattr(options, name) != OPTIONS[name].default}
    if options.bias != "none":
        same["bias"] = "gralora_only" if options.bias == "lora_only" and options.backend != "lora" else options.bias
    if options.exclude_modules:
        same["exclude_modules"] = parse_targets(options.exclude_modules)
    # Where all matched layers are adapted alike, one that does not fit is named with its shape.
    if options.backend != "lora" and options.k != "auto" and not {"k_pattern", "exclude_modules"} & same.keys():
        _check_widths(layers, options.k)
    common = {
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "fan_in_fan_out": bool(layers) and all(isinstance(m, Conv1D) for _, m in layers),
        **same,
    }
    if options.backend == "lora":
        return peft.LoraConfig(
            r=options.r + options.hybrid_r,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            init_lora_weights=options.init_weights,
            **common,
        )
    from gralora_ext import GraloraConfig

    return (GraloraConfig if options.backend == "fused" else peft.GraloraConfig)(
        r=options.r,
        hybrid_r=options.hybrid_r,
        alpha=options.alpha,
        gralora_dropout=options.dropout,
        gralora_k=options.k,
        init_weights=options.init_weights,
        **common,
    )


def matched_layers(model: Any, targets: str | list[str]) -> list[tuple[str, Any]]:
    """The layers that PEFT is going to wrap, with JobError where a target names none."""
    from transformers.pytorch_utils import Conv1D

    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    head = model.get_output_embeddings()
    names = sorted({n.rsplit(".", 1)[-1] for n, _ in linear})

    def found(pattern: str, matches: Any) -> list[tuple[str, torch.nn.Module]]:
        layers = [(n, m) for n, m in linear if matches(n)]
        if not layers:
            raise JobError(
                f"--target-modules: '{pattern}' matches no linear layer of the model; it has {', '.join(names)}"
            )
        return layers

    if targets == "all-linear":
        return [(n, m) for n, m in linear if m is not head]
    if isinstance(targets, str):
        return found(targets, re.compile(targets).fullmatch)
    layers = {n: m for t in targets for n, m in found(t, lambda n, t=t: n == t or n.endswith("." + t))}
    return list(layers.items())


def load_adapter(model: Any, folder: Path) -> None:
    """Puts the weights of a saved adapter into ``model``; JobError unless they are all of its adapter and no others."""
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    try:
        saved = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors, or the system below it
        raise JobError(f"{folder} has no adapter that can be loaded: {first_sentence(error)}") from error
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(own.keys() ^ saved.keys()):
        what = "is missing" if name in own else "is not one of its tensors"
        raise JobError(f"{folder} is not a checkpoint of this adapter: {name} {what}")
    for name, tensor in saved.items():
        if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
            raise JobError(
                f"{folder} is not a checkpoint of this adapter: {name} is {tensor.dtype} {tuple(tensor.shape)} there, "
                f"and {own[name].dtype} {tuple(own[name].shape)} here"
            )
    set_peft_model_state_dict(model, saved)


def _check_saved(model: Any, names: list[str]) -> None:
    modules = {module.rsplit(".", 1)[-1] for module, _ in model.named_modules()}
    for name in names:
        if name not in modules and not any(n.endswith(name) for n, _ in model.named_modules()):
            raise JobError(f"--modules-to-save: '{name}' matches no module of the model")


def check_mergeable(model: Any, options: Any) -> None:
    """JobError where the adapter cannot be merged in the end.

    Its bias has no place in a layer that has none; the files of the base are quantized; an adapted layer is the embedding too.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not options.merge:
        return
    base = model.get_base_model()
    method = getattr(base, "quantization_method", None)
    if method is not None and bits_of(options) is None:
        raise JobError(
            f"--model: its weights are quantized in their files ({getattr(method, 'value', method)}), and a quantized model is "
            "not what the adapter is merged into: give --no-merge too"
        )
    embedding = getattr(base.get_input_embeddings(), "weight", None)
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer = module.get_base_layer()
        if options.lora_bias and isinstance(module, LoraLayer) and getattr(layer, "bias", None) is None:
            raise JobError(f"--lora-bias cannot be merged, since {name} has no bias: give --no-merge too")
        if isinstance(layer, torch.nn.Linear) and layer.weight is embedding:
            raise JobError(
                f"--target-modules: {name.rsplit('.', 1)[-1]} shares its weight with the embedding, which a merge would change "
                "too: give --no-merge, and `gralora-ext merge` makes a merged model that has both"
            )


def _check_widths(layers: list[tuple[str, Any]], k: int) -> None:
    for name, module in layers:
        # A quantized weight is packed and has another shape.
        shape = (
            (module.out_features, module.in_features) if isinstance(module, torch.nn.Linear) else module.weight.shape
        )
        for width in shape:
            if width % k:
                raise JobError(f"--k {k} does not divide the width {width} of {name} ({tuple(shape)})")


def trainable_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
