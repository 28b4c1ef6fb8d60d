# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext export-lora``: a GraLoRA adapter as a LoRA adapter, for programs that know LoRA alone."""

from __future__ import annotations

from pathlib import Path

from ..program.errors import JobError
from ..program.signals import stopper
from .parser import Parser

DESCRIPTION = """Writes a GraLoRA adapter as a LoRA adapter, from its files alone. Without --rank the LoRA is exact: its rank is
k r + hybrid_r, its elements are the adapter's own and zeros."""


def run(argv: list[str]) -> int:
    """Writes the LoRA and prints its ranks, and the error of each layer that was truncated; returns 0."""
    parser = Parser("gralora-ext export-lora", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="the folder of a GraLoRA adapter")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="truncate layers of a larger rank to the nearest LoRA of this one"
    )
    parser.add_argument(
        "--for",
        dest="serve_for",
        metavar="SERVER",
        help="vllm: one rank for all layers, of those that vLLM serves, and the scaling multiplied into lora_B",
    )
    parser.add_argument("--debug", action="store_true", help="on an error, show where it happened")
    options = parser.parse_args(argv)
    stopper.install()
    from ..checkpoint.export import check_arguments, export_lora

    try:
        check_arguments(options.rank, options.serve_for)
    except ValueError as error:
        raise JobError(f"--{str(error).removeprefix('serve_')}") from None
    report = export_lora(options.adapter, options.out, rank=options.rank, serve_for=options.serve_for)
    ranks = sorted({layer.rank for layer in report.layers})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    cut = [layer for layer in report.layers if layer.rank < layer.exact_rank]
    kind = f"{len(cut)} of them truncated" if cut else "exact"
    print(f"{options.out}: a LoRA of {len(report.layers)} layers, {span}, {kind}")
    width = max((len(layer.name) for layer in cut), default=0)
    for layer in cut:
        print(f"  {layer.name:{width}}  rank {layer.rank} of {layer.exact_rank}  relative error {layer.error:.2e}")
    for note in report.notes:
        print(f"note: {note}")
    return 0
