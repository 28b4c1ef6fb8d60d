# SPDX-License-Identifier: Apache-2.0
"""The model: found as a folder, a GGUF file or a hub name, and loaded in one dtype."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from .. import repacking
from ..program.errors import JobError, clipped, first_sentence
from ..program.resources import memory_failure
from .gguf import folder_of_gguf
from .source import Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ELEMENTS = 64  # of each weight, by which a base is known


def load(
    source: Source,
    dtype: str,
    say: Any,
    bits: int | None = None,
    device: str = "cpu",
    attention: str | None = None,
) -> tuple[Any, Any]:
    """The model and its tokenizer. A GGUF file is converted once, into a cache of safetensors folders.

    With ``bits`` the model is quantized with them, on ``device``, where it stays. ``attention`` is what transformers
    calls ``attn_implementation``; None is the model's own.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = str(folder_of_gguf(Path(source.place), say)) if source.is_gguf else source.place
    part = "config.json"
    try:
        config = AutoConfig.from_pretrained(place)  # first, since a hub that does not answer is then asked once
        if bits is not None and getattr(config, "quantization_config", None) is not None:
            raise JobError(f"--load-in-{bits}bit: {source.name} is quantized already: leave that option out")
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(place)
        part = "weights"
        model, info = AutoModelForCausalLM.from_pretrained(
            place,
            output_loading_info=True,
            dtype=DTYPES[dtype],
            **_quantization(bits, dtype, device),
            **({} if attention is None else {"attn_implementation": attention}),
        )
    except Exception as error:  # the hub, the network, safetensors and tokenizers all raise their own
        if isinstance(error, JobError) or memory_failure(error):
            raise
        if attention and part == "weights" and ("attn" in str(error) or "ttention" in str(error)):
            raise JobError(
                f"--attn-implementation {attention} does not work with {source.name} here: {first_sentence(error)}"
            ) from error
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
    """What ``from_pretrained`` is told beside the dtype: QLoRA's settings, and the device, since it quantizes there."""
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


def weights_digest(model: torch.nn.Module) -> str:
    """The SHA-256 of some elements of each weight, evenly spaced: those of another model differ, wherever its files lie.

    Of quantized weights none is taken, since devices may quantize differently, nor of what processes share out already.
    """
    value = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if weight.is_floating_point() and getattr(weight, "quant_state", None) is None:
            flat = weight.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _ELEMENTS)].cpu()
            value.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.double().numpy().tobytes())
    return value.hexdigest()


def _check_ends(model: Any, source: Source) -> None:
    ends = model.generation_config.eos_token_id
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and (type(end) is not int or not 0 <= end < 2**31):
            raise JobError(
                f"--model {source.name}: eos_token_id in its generation_config.json is {clipped(repr(end))}, which is no "
                "token: get that file again, or remove it"
            )


def check_vocabulary(model: Any, source: Source, examples: list[dict[str, list[int]]]) -> int:
    """That the model has an embedding for each token that the tokenizer made of the rows; how many it has."""
    largest = max(max(e["input_ids"]) for e in examples)
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise JobError(
            f"--model {source.name}: its tokenizer makes the token {largest}, and the model knows {known}: "
            "the tokenizer's files are damaged, or another model's"
        )
    return int(known)


def save_memory(model: Any, source: Source) -> None:
    """Gradient checkpointing: of each block of layers only the input is kept for backward."""
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise JobError(f"--gradient-checkpointing: {source.name} has none: {first_sentence(error)}") from error
