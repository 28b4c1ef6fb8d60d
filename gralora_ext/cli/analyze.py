# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext analyze rank | outlier | grid``: their options. Needs no torch."""

from __future__ import annotations

import argparse
from typing import Any

from ..compare.methods import METHODS
from ..program.errors import JobError, clipped, did_you_mean
from ..program.signals import stopper
from .checks import check_packages
from .run_options import add_output, add_training, described, parse, parser, whole

_COMMON = {"batch_size": 4, "max_length": 384, "general_texts": 1, "validation_rows": 64, "test_rows": 64, "seeds": 3}
_QUICKLY = {"batch_size": 2, "max_length": 256, "validation_rows": 8, "test_rows": 8}
_WHAT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rank": (
        """\
Measures the rank of ΔW after training, for GraLoRA with k = 1, 2, 4 and 8: in the first, middle and last block of the
model, trained by the job of `finetune`, and in one wide layer that is trained alone at the paper's r = 128, whose k·r a
small model's layers do not hold.
""",
        {**_COMMON, "rank": 16, "steps": 10, "test_rows": 8, "lrs": [1e-3]},
        {**_QUICKLY, "steps": 2, "test_rows": 4, "seeds": 2},
    ),
    "outlier": (
        """\
Measures how far the gradient of ΔW by LoRA and by GraLoRA is from full fine-tuning's, block by block, with the
strongest channel of a layer's input and with that channel at the median's size: in the down_proj layers of the first, middle and
last block, after some steps of training.
""",
        {**_COMMON, "rank": 32, "steps": 10, "test_rows": 8, "lrs": [1e-3]},
        {**_QUICKLY, "steps": 2, "test_rows": 4, "seeds": 2},
    ),
    "grid": (
        """\
Measures the held-out loss over rank and k: whether LoRA gets worse at high rank and GraLoRA does not, and whether the
best k is the one with r/k² nearest to 8. Each case has its learning rate chosen on validation rows.
""",
        # A run's sizes are those of `compare`, so that its runs are runs of the grid too.
        {**_COMMON, "ranks": [8, 32, 128, 256], "ks": [2, 4, 8], "steps": 16, "validation_rows": 40, "extend": 2,
         "general_texts": 24},
        {**_QUICKLY, "ranks": [8, 32], "ks": [2], "steps": 3, "seeds": 2, "extend": 0, "lrs": [1e-3], "general_texts": 1},
    ),
}  # fmt: skip
ABOUT = "rank, outlier or grid comes first; `gralora-ext analyze rank --help` and so on list the options of each."


def options(argv: list[str]) -> argparse.Namespace:
    what = argv[0] if argv else ""
    if what in ("--help", "-h"):
        parser("gralora-ext analyze", ABOUT).parse_args(["--help"])
    if what not in _WHAT:
        hint = did_you_mean(what, _WHAT)
        raise JobError(f"analyze: expected rank, outlier or grid, got '{clipped(what)}'{hint}")
    about, defaults, quick = _WHAT[what]
    files = (
        f"\nIt writes {what}.json, {what}.png and {what}.svg into --output, and a JSON file per run into runs/ there.\n"
    )
    of = parser(f"gralora-ext analyze {what}", f"{about}{files}{described(defaults, quick)}")
    add_output(of, f"runs/analyze-{what}")
    add_training(of, rank=what != "grid")
    if what == "grid":
        of.add_argument("--ranks", type=whole(1), nargs="+", metavar="N", help="the ranks")
        of.add_argument("--ks", type=whole(2), nargs="+", metavar="N", help="the k of GraLoRA, beside LoRA")
    found = parse(of, argv[1:], defaults, quick)
    found.what, found.extend = what, found.extend or 0
    if what == "grid":
        found.rank = min(found.ranks)  # of no run: each has its own
    ks = getattr(found, "ks", None) or [1, 2, 4, 8]
    if unknown := next((k for k in ks if k not in (1, 2, 4, 8)), None):
        raise JobError(f"--ks: expected 2, 4 or 8, got {unknown}")
    for rank in getattr(found, "ranks", None) or [found.rank]:
        for k in ks:
            METHODS[f"gralora-k{k}"].check_rank(rank, f"analyze {what}")
    return found


def run(arguments: list[str]) -> int:
    wanted = options(arguments)
    check_packages()
    stopper.install()
    from ..compare.analysis import analyze

    return analyze(wanted)
