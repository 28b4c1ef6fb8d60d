# SPDX-License-Identifier: Apache-2.0
"""GGUF files as ordinary transformers folders: converted once into a cache, checked on every use.

The cache is ``gralora_ext`` under ``XDG_CACHE_HOME`` (``~/.cache``); a folder there can be loaded with stock
``from_pretrained``, and adapters name it as their base. It may be deleted at any time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..program.errors import JobError, first_sentence
from ..program.files import locked, staged, write_json
from ..program.resources import memory_failure
from .manifest import digest

MANIFEST = "gralora_ext.json"


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # the reader of GGUF files raises whatever a damaged one makes it stumble over
        if memory_failure(error):
            raise
        raise JobError(f"{path} cannot be read as a GGUF model: {first_sentence(error)}") from error
    # The weights are plain float32 now; the marks of the quantized file would make save_pretrained
    # and Trainer refuse.
    model.hf_quantizer = None
    model.is_quantized = False
    for holder, mark in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(holder, mark):
            delattr(holder, mark)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _fault(folder: Path) -> str | None:
    """What is wrong with a cached folder, or None."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return next((f"{name} has changed" for name, value in digests.items() if digest(folder / name) != value), None)
    except (OSError, ValueError, AttributeError) as error:
        return first_sentence(error)
