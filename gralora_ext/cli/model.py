# SPDX-License-Identifier: Apache-2.0
"""The model: found as a folder, a GGUF file or a hub name, loaded in one dtype, and fitted with an adapter."""

from __future__ import annotations

import re
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from .. import repacking
from ..program.errors import JobError, clipped, first_sentence
from ..program.resources import memory_failure
from .gguf import folder_of_gguf
from .source import Source, parse_targets

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16}


def load(source: Source, dtype: str, say: Any, bits: int | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """The model and its tokenizer. A GGUF file is converted once, into a cache of safetensors folders.

    With ``bits`` the model is quantized with them, on ``device``, where it stays.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = str(folder_of_gguf(Path(source.place), say)) if source.is_gguf else source.place
    part = "config.json"
    try:
        AutoConfig.from_pretrained(place)  # first, since a hub that does not answer is then asked once
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(place)
        part = "weights"
        model, info = AutoModelForCausalLM.from_pretrained(
            place, output_loading_info=True, dtype=DTYPES[dtype], **_quantization(bits, dtype, device)
        )
    except Exception as error:  # the hub, the network, safetensors and tokenizers all raise their own
        if memory_failure(error):
            raise
        what, cure = "it is neither a folder nor a file here, and as a name on the hub: ", ""
        if Path(place).is_dir():
            what, cure = f"its {part}: ", "; where that is damaged or missing, get or convert it again"
        raise JobError(f"--model {source.name} cannot be loaded: {what}{first_sentence(error)}{cure}") from error
    if info.get("missing_keys"):
        missing = sorted(info["missing_keys"])
        raise JobError(f"--model {source.name} lacks {len(missing)} of its weights, such as {missing[0]}")
    _check_finite(model, source)
    _check_ends(model, source)
    repacking.stop(model)  # whatever the backend: evaluations come before training steps
    return model, tokenizer


def _quantization(bits: int | None, dtype: str, device: str) -> dict[str, Any]:
    """What ``from_pretrained`` is told beside the dtype: QLoRA's settings for 4 bits, and the device, since it quantizes there."""
    if bits is None:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _check_finite(model: torch.nn.Module, source: Source) -> None:
    """A weight that is no number makes every loss one that is none; of a quantized one the statistics tell."""
    states = ((name, getattr(weight, "quant_state", None)) for name, weight in model.named_parameters())
    offsets = ((name, state.offset) for name, state in states if state is not None and state.nested)
    for name, weight in chain(model.state_dict().items(), offsets):
        if weight.is_floating_point() and weight.numel() and not all(e.isfinite() for e in torch.aminmax(weight)):
            raise JobError(
                f"--model {source.name}: its weight {name} holds NaN or infinity in {weight.dtype}: the file is damaged, "
                "get or convert it again"
            )


def _check_ends(model: Any, source: Source) -> None:
    ends = model.generation_config.eos_token_id
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and (type(end) is not int or not 0 <= end < 2**31):
            raise JobError(
                f"--model {source.name}: eos_token_id in its generation_config.json is {clipped(repr(end))}, which is no "
                "token: get that file again, or remove it"
            )


def check_vocabulary(model: Any, source: Source, examples: list[dict[str, list[int]]]) -> None:
    """That the model has an embedding for each token that the tokenizer made of the rows."""
    largest = max(max(e["input_ids"]) for e in examples)
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise JobError(
            f"--model {source.name}: its tokenizer makes the token {largest}, and the model knows {known}: "
            "the tokenizer's files are damaged, or another model's"
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


def add_adapter(model: Any, options: Any) -> Any:
    """Fits ``model`` with the adapter of ``options.backend``; returns the PeftModel, adapters in fp32.

    GraLoRA and LoRA get the same number of parameters and the same scale: LoRA's rank is r + hybrid_r.
    """
    import peft

    import gralora_ext

    fused = options.backend == "fused"
    # Our configuration has fields that only our layers know.
    with gralora_ext.enable() if fused else nullcontext():
        config, layers = _config(model, options)
        fitted = peft.get_peft_model(model, config)
    if fused:
        ours = sum(isinstance(m, gralora_ext.GraloraLinear) for m in fitted.modules())
        if ours != len(layers):
            raise JobError(f"only {ours} of the {len(layers)} layers are fused: use --backend peft, and report this")
    return fitted


def _config(model: Any, options: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """The adapter's configuration, and the layers that it is for."""
    import peft
    from transformers.pytorch_utils import Conv1D

    from gralora_ext import GraloraConfig

    targets = parse_targets(options.target_modules)
    layers = matched_layers(model, targets)
    if options.backend != "lora" and options.k != "auto":
        _check_widths(layers, options.k)
    common = {
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "fan_in_fan_out": all(isinstance(m, Conv1D) for _, m in layers),
        # What `compare` asks for beside finetune's own options, by its name in the configuration.
        **{n: getattr(options, n) for n in ("use_rslora", "use_dora", "init_weights") if hasattr(options, n)},
    }
    if options.backend == "lora":
        r = options.r + options.hybrid_r
        return peft.LoraConfig(r=r, lora_alpha=options.alpha, lora_dropout=options.dropout, **common), layers
    config = (GraloraConfig if options.backend == "fused" else peft.GraloraConfig)(
        r=options.r,
        hybrid_r=options.hybrid_r,
        alpha=options.alpha,
        gralora_dropout=options.dropout,
        gralora_k=options.k,
        **common,
    )
    return config, layers


def load_adapter(model: Any, folder: Path) -> None:
    """Puts the weights of a saved adapter into ``model``; JobError unless they are all of its adapter's, and no others."""
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
