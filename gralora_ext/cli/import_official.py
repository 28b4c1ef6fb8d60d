# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext import-official``: a checkpoint of the paper's own repository as one of PEFT's."""

from __future__ import annotations

from pathlib import Path

from ..program.signals import stopper
from .parser import Parser

DESCRIPTION = """Writes a checkpoint of the paper's own repository (SqueezeBits/GraLoRA) as one that PEFT reads. The tensors stay; r,
which counts the hybrid ranks there, and alpha get PEFT's meaning."""


def run(argv: list[str]) -> int:
    """Writes the checkpoint and prints its settings; returns 0."""
    parser = Parser("gralora-ext import-official", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="the folder of the checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    parser.add_argument("--debug", action="store_true", help="on an error, show where it happened")
    options = parser.parse_args(argv)
    stopper.install()
    from ..checkpoint.official import import_official

    report = import_official(options.adapter, options.out)
    print(
        f"{options.out}: a GraLoRA adapter of {report.layers} layers, r {report.r}, hybrid_r {report.hybrid_r}, alpha "
        f"{report.alpha:g}"
    )
    for note in report.notes:
        print(f"note: {note}")
    return 0
