# SPDX-License-Identifier: Apache-2.0
"""GGUF files as ordinary transformers folders: converted once into a cache, checked on every use.

The cache is ``gralora_ext`` under ``XDG_CACHE_HOME`` (``~/.cache``); a folder there can be loaded with stock
``from_pretrained``, and adapters name it as their base. It may be deleted at any time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..program.errors import JobError, first_sentence
from ..program.files import locked, staged, write_json
from ..program.resources import memory_failure
from .manifest import digest

MANIFEST = "gralora_ext.json"
_PART = re.compile(r"-\d{5}-of-(\d{5})$")  # of a name, as llama.cpp's gguf-split gives it


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gralora_ext"


def folder_of_gguf(path: Path, say: Any) -> Path:
    """The folder with the model of the GGUF file ``path`` in float32, and its tokenizer.

    It is named for the file's content and for the major release of transformers, whose tokenizer files differ. It is
    written beside its place and renamed, and carries a list of its files with their digests: a folder that differs from
    its list is converted again.
    """
    if importlib.util.find_spec("gguf") is None:
        raise JobError(f"{path.name} is a GGUF file, and reading those needs `pip install gguf`")
    part = _PART.search(path.stem)
    if part and int(part[1]) > 1:
        raise JobError(
            f"{path.name} is one of {int(part[1])} parts of a model: join them with `llama-gguf-split --merge` of llama.cpp, and "
            "name the file that it makes"
        )
    from transformers import __version__

    folder = cache_folder() / f"{path.stem}-{digest(path)[:12]}-transformers{__version__.split('.')[0]}"
    with locked(cache_folder(), wait=True):
        if folder.exists():
            fault = _fault(folder)
            if fault is None:
                return folder
            say(f"the cached model is damaged ({fault}); converting it again")
            shutil.rmtree(folder)
        say(f"converting {path.name} to float32 safetensors, once, into {folder}")
        with staged(cache_folder()) as stage:
            target = stage / folder.name
            _convert(path, target)
            write_json(target / MANIFEST, {p.name: digest(p) for p in sorted(target.iterdir())})
    return folder


def _convert(path: Path, target: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with _readable(path):
        rope = rope_types(AutoConfig.from_pretrained(**source))
        scaling = rope_scaling(path)
    if scaling and rope == {"default"}:
        raise JobError(
            f"{path} scales its rotary embeddings ({scaling}), which transformers does not read from a GGUF file: name the folder of "
            "the model that the file was made of"
        )
    with _readable(path):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, info = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise JobError(
            f"{path} lacks {len(missing)} of its model's weights, such as {missing[0]}: get the file again, or all of its parts, joined"
        )
    # The weights are plain float32 now; the marks of the quantized file would make save_pretrained
    # and Trainer refuse.
    model.hf_quantizer = None
    model.is_quantized = False
    for holder, mark in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(holder, mark):
            delattr(holder, mark)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the reader of GGUF files raises, which is whatever a damaged one makes it stumble over, becomes a JobError."""
    try:
        yield
    except Exception as error:
        if memory_failure(error):
            raise
        raise JobError(f"{path} cannot be read as a GGUF model: {first_sentence(error)}") from error


def rope_scaling(path: Path) -> str:
    """What the GGUF file has that changes the frequencies of its rotary embeddings; empty where there is nothing.

    Llama 3.1 has a tensor of factors, Phi-3 has two, and other models name a type.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for tensor in reader.tensors:
        if tensor.name.startswith(("rope_freqs.", "rope_factors_")) and (tensor.data != 1).any():
            return str(tensor.name)
    for name, field in reader.fields.items():
        if name.endswith(".rope.scaling.type") and bytes(field.parts[-1]) != b"none":
            return f"{name} {bytes(field.parts[-1]).decode()!r}"
    return ""


def rope_types(config: Any) -> set[str]:
    """The kinds of rotary embeddings in a configuration, of which a model may have one for each kind of its layers."""
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [part for part in said.values() if isinstance(part, dict)] or [said]
    return {kind.get("rope_type") or kind.get("type") or "default" for kind in kinds}


def _fault(folder: Path) -> str | None:
    """What is wrong with a cached folder, or None."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return next((f"{name} has changed" for name, value in digests.items() if digest(folder / name) != value), None)
    except (OSError, ValueError, AttributeError) as error:
        return first_sentence(error)
