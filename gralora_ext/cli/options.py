# SPDX-License-Identifier: Apache-2.0
"""The options of a job: the command line over a configuration file over the defaults, and what they must be together."""

from __future__ import annotations

import argparse
import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..program.errors import JobError, clipped
from . import config_file
from .kinds import LARGEST
from .option_table import OPTIONS
from .parser import HOW, JobParser
from .source import check_targets

SETTINGS = "finetune.json"  # in the output folder: the settings, as a file for --config; the mark of a job's folder
_INPUTS = ("model", "data", "eval_data", "chat_template", "accelerate_config")  # options that may be paths


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of ``argv`` and of its ``--config`` file, checked as far as that goes without data and model."""
    parser = JobParser()
    typed = vars(parser.parse_args(argv))
    chosen: dict[str, Any] = {}
    if "config" in typed:
        _check_path("config", typed["config"])
        typed["config"] = os.path.expanduser(typed["config"])
        chosen = config_file.values(parser, Path(typed["config"]))
    # The other length of the job, given in the file, yields to the one on the command line.
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in typed and other not in typed:
            chosen.pop(other, None)
    # Files of older jobs have both, though nothing is drawn where the rows to hold out are given.
    if "eval_data" in chosen or "eval_data" in typed:
        chosen.pop("held_out_from", None)
    how = {"config": None, "resume": False, "print_config": False, "debug": False}
    defaults = {key: option.default for key, option in OPTIONS.items()}
    options = argparse.Namespace(**{**defaults, **how, **chosen, **typed})
    _check_together(options)
    _resolve(options)
    for name in (*_INPUTS, "output"):
        value = getattr(options, name)
        for path in [value] if isinstance(value, str) else value or []:
            _check_path(name, path)
    # The shell leaves a ~ behind an equals sign as it is, and a file's is not the shell's at all.
    # What reads models and rows expands it there.
    for name in ("output", "accelerate_config"):
        if getattr(options, name) is not None:
            setattr(options, name, os.path.expanduser(getattr(options, name)))
    return options


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options as a file for ``--config`` that works from any folder: paths are absolute, what is unset is left out."""
    values = {k: v for k, v in vars(options).items() if v is not None and k not in HOW}
    for name in _INPUTS:
        if name in values:
            one = isinstance(values[name], str)
            places = [_absolute(place) for place in ([values[name]] if one else values[name])]
            values[name] = places[0] if len(places) == 1 else places
    return {**values, "output": str(Path(options.output).resolve())}


def decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that decide the numbers of a job, and must be the same when it is resumed."""
    found = {name: value for name, value in values.items() if name not in OPTIONS or not OPTIONS[name].free}
    if found.get("eval_data") is not None:
        # It decides nothing then. It is always what it would be without --eval-data, as in the
        # checkpoints of older jobs, so that those can be resumed.
        found["held_out_from"] = _held_out_from(found.get("data"))
    return found


def bits_of(options: argparse.Namespace) -> int | None:
    """How many bits bitsandbytes leaves of a weight of the base; None where it is not quantized."""
    return 4 if options.load_in_4bit else 8 if options.load_in_8bit else None


def _absolute(place: str) -> str:
    path = Path(place).expanduser()
    return os.path.abspath(path) if path.exists() else place  # a link stays one: what it leads to may move


_EXCLUDE = (
    ("steps", "epochs"),
    ("load_in_4bit", "load_in_8bit"),
    ("bf16", "fp16"),
    ("warmup_steps", "warmup_ratio"),
    ("eval_data", "held_out"),
    ("eval_data", "held_out_from"),
    ("messages_field", "text_field"),
    *((whole, part) for whole in ("messages_field", "text_field") for part in ("prompt_field", "answer_field")),
)
# Of options that not every optimizer reads: those that do, by a part of their name in --optim.
_READERS = {
    "adam_beta1": {"adam": "AdamW", "lion": "Lion"},
    "adam_beta2": {"adam": "AdamW", "lion": "Lion"},
    "adam_epsilon": {"adam": "AdamW"},
}
_BEGINNINGS = {"fused": ("gaussian", "orthogonal"), "peft": (), "lora": ("gaussian", "orthogonal", "olora", "pissa")}


def _check_together(options: argparse.Namespace) -> None:
    for one, other in _EXCLUDE:
        if _is_given(options, one) and _is_given(options, other):
            raise JobError(f"{_typed(one)} and {_typed(other)} exclude each other")
    for option in OPTIONS.values():
        if options.backend not in option.only and _is_given(options, option.key):
            raise JobError(f"--{option.name} needs --backend {' or '.join(option.only)}, and it is {options.backend}")
    begins = options.init_weights
    if isinstance(begins, str) and begins not in _BEGINNINGS[options.backend]:
        there = ", ".join(("true", "false", *_BEGINNINGS[options.backend]))
        raise JobError(f"--init-weights {begins}: with --backend {options.backend} there is {there}")
    if begins in ("olora", "pissa") and bits_of(options):
        raise JobError(
            f"--init-weights {begins} changes the base, which --load-in-{bits_of(options)}bit leaves as it is"
        )
    if options.k == "auto" and options.backend == "peft":
        raise JobError("--k auto needs --backend fused, and it is peft")
    if options.backend != "lora" and options.k != "auto" and not options.rank_pattern and options.r % options.k:
        raise JobError(f"--k {options.k} does not divide --r {options.r}")
    if (options.attn_implementation or "").startswith("flash") and options.dtype == "fp32":
        raise JobError(f"--attn-implementation {options.attn_implementation} needs --dtype bf16: it has no float32")
    check_targets("target-modules", options.target_modules)
    check_targets("exclude-modules", options.exclude_modules or [])
    if options.layers_pattern and not options.layers_to_transform:
        raise JobError("--layers-pattern needs --layers-to-transform")
    if options.eval_split and not options.eval_data:
        raise JobError("--eval-split needs --eval-data")
    for key, readers in _READERS.items():
        if _is_given(options, key) and not any(name in options.optim for name in readers):
            raise JobError(f"{_typed(key)} is of {' and '.join(readers.values())}, and --optim is {options.optim}")
    if options.report_to and "none" in options.report_to and len(options.report_to) > 1:
        raise JobError("--report-to: none goes with no other name")


def _is_given(options: argparse.Namespace, key: str) -> bool:
    """Whether an option asks for anything. A 0, which is equal to False, does not."""
    return getattr(options, key) not in (OPTIONS[key].default, None, False)


def _typed(key: str) -> str:
    return f"--{OPTIONS[key].name}"


def _resolve(options: argparse.Namespace) -> None:
    """Gives what depends on other options its value."""
    if options.steps is None and options.epochs is None:
        options.steps = 30
    if options.alpha is None:
        options.alpha = 2 * (options.r + options.hybrid_r)
    if options.held_out_from is None and options.eval_data is None:
        options.held_out_from = _held_out_from(options.data)
    if options.eval_rows_from is None:
        options.eval_rows_from = "start" if options.data is None else "all"
    if options.report_to == ["none"]:
        options.report_to = None
    if options.output is None:
        names = [Path(options.model or "smollm2").name, Path((options.data or ["gsm8k"])[0]).name]
        names = [re.sub(r"\.(gguf|jsonl?|csv|tsv|parquet)$", "", name) for name in names]
        options.output = str(Path("runs") / re.sub(r"[^\w.-]+", "-", "-".join(names)))


def _held_out_from(data: list[str] | None) -> str:
    return "end" if data is None else "random"


# The longest that is written below --output.
_DEEPEST = f"checkpoints/.partial-12345678/checkpoint-{LARGEST}/adapter_model.safetensors"


def _check_path(key: str, text: str) -> None:
    """That the system can take ``text`` for a path; whether there is anything is for others to say."""
    option = f"--{key.replace('_', '-')}"
    if not text.strip():
        raise JobError(f"{option}: expected a path, got an empty text")
    try:
        path = Path(text).expanduser()
        if any(len(os.fsencode(part)) > 255 for part in path.parts):  # the system only looks where the folder is there
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.stat(path / _DEEPEST if key == "output" else path)
    except (ValueError, RuntimeError) as error:  # a NUL, half of a surrogate pair, a user who has no home
        raise JobError(f"{option}: {clipped(repr(text))} cannot be a path: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise JobError(f"{option}: {clipped(text)} cannot be a path: {error.strerror}") from None
