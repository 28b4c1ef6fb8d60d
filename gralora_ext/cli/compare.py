# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext compare``: its options. Needs no torch."""

from __future__ import annotations

import argparse

from ..compare.methods import DEFAULT, METHODS, QUICK, chosen
from ..program.signals import stopper
from .checks import check_packages
from .run_options import add_output, add_training, described, parse, parser

DEFAULTS = {
    "methods": list(DEFAULT),
    "seeds": 3,
    "rank": 32,
    "steps": 16,
    "batch_size": 4,
    "max_length": 384,
    "test_rows": 64,
    "validation_rows": 40,
    "general_texts": 24,
    "extend": 2,
}
QUICKLY = {
    "methods": list(QUICK),
    "seeds": 2,
    "steps": 3,
    "batch_size": 2,
    "max_length": 256,
    "test_rows": 8,
    "validation_rows": 6,
    "general_texts": 3,
    "extend": 0,
}

DESCRIPTION = f"""\
Compares ways to fine-tune: each method is trained by the job of `finetune`, with the same rows in the same order.
A method's learning rate is the one of a small grid with the least loss on validation rows, which are cut from the
training rows; test rows are read by the measured runs alone, once, at their end. Weight decay is 0 for all.

It writes into --output:
  compare.html      the table, a plot with axes to choose, loss curves, each run's settings; needs no network
  summary.json      the table; compare.png, compare.svg: a picture of it
  runs/             one JSON file per run; a run that is there is not made again, so that a stopped comparison goes on,
                    and more methods or seeds can be added later; page and table are of the last command alone
  logs/, texts/     what each run said; the rows

Methods: {", ".join(METHODS)}, or all.
{described(DEFAULTS, QUICKLY)}"""


def options(argv: list[str]) -> argparse.Namespace:
    of = parser("gralora-ext compare", DESCRIPTION)
    add_output(of, "runs/compare")
    of.add_argument("--methods", nargs="+", metavar="NAME", help="which, see above")
    add_training(of)
    found = parse(of, argv, DEFAULTS, QUICKLY)
    for method in chosen(found.methods):
        method.check_rank(found.rank, f"--rank {found.rank}")
    return found


def run(arguments: list[str]) -> int:
    wanted = options(arguments)
    check_packages()
    stopper.install()
    from ..compare.comparison import compare

    return compare(wanted)
