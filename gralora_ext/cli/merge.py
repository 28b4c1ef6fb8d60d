# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext merge``: a base model and adapters, all in files, become one model in files."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..program.console import LINE_SECONDS, Console
from ..program.errors import JobError, Stopped, clipped, stops_unwrapped
from ..program.files import free_bytes
from ..program.signals import stopper
from .parser import Parser

if TYPE_CHECKING:
    from ..checkpoint import MergeReport

DESCRIPTION = """\
Merges GraLoRA or LoRA adapters into a model, from files into files, in at most 64 MiB and one layer's adapter beyond what
the program takes. Each weight gets the bits that PEFT's merge_and_unload gives it with our layers.

It writes the model to OUT, a new or empty folder, with the tokenizer and the other small files of BASE, and merge.json,
which lists what it was made of. When it is killed, the same command goes on; when all is done, it ends at once.
"""
EPILOG = "Exit codes: 0 done, 2 something to mend (one sentence on stderr says what), 130 or 143 stopped by a signal."
DTYPES = ("bf16", "fp16", "fp32")


def run(argv: list[str]) -> int:
    """Merges as ``argv`` says, and returns the exit code."""
    options = parse(argv)
    stopper.install()
    # Threads that spin while they wait take the time of those that read, hash and write.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ..checkpoint import merge

    console = Console()
    base, *adapters, out = options.folders
    settings = {"dtype": options.dtype, "max_shard_size": options.max_shard_size, "scale": options.scale}
    settings["overwrite"] = options.overwrite
    try:
        with stops_unwrapped():
            if options.dry_run:
                _tell_plan(merge(base, adapters, out, **settings, dry_run=True))
                return 0
            with _progress(console) as progress:
                report = merge(base, adapters, out, **settings, progress=progress)
            _tell(console, report)
    except Stopped as stop:
        print(f"stopped by {stop.name}; the same command goes on from the files that are finished", file=sys.stderr)
        return stop.exit_code
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; JobError where something is wrong with them."""
    parser = Parser(
        "gralora-ext merge",
        usage="gralora-ext merge BASE ADAPTER [ADAPTER ...] OUT [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="FOLDER",
        help="the model, the adapters in the order in which they are merged, the result",
    )
    parser.add_argument("--dtype", type=_dtype, help="bf16, fp16 or fp32 for all weights (default: each keeps its own)")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="most bytes of a file, such as 5GB (default: files as in BASE)"
    )
    parser.add_argument(
        "--scale",
        type=_scale,
        default=1.0,
        help="multiplies what is added; not for adapters that hold tensors whole (default: 1.0)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier merge in OUT")
    parser.add_argument("--dry-run", action="store_true", help="check, tell tensors and disk, and write nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # before Python 3.14 it does not know -1e-3
    options = parser.parse_intermixed_args(argv)
    if len(options.folders) < 3:
        raise JobError(f"merge: expected BASE, at least one ADAPTER, and OUT, got {len(options.folders)} folders")
    for what, folder in (("BASE", options.folders[0]), *(("ADAPTER", each) for each in options.folders[1:-1])):
        if not Path(folder).expanduser().is_dir():
            raise JobError(f"{what}: {clipped(folder)} is not a folder")
    return options


def _dtype(text: str) -> str:
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    name = names.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected bf16, fp16 or fp32, got '{text}'")
    return name


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got '{text}'")
    return value


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """A function for :func:`gralora_ext.checkpoint.merge`: a bar on a terminal, else a line every few seconds."""
    from tqdm import tqdm

    bar = tqdm(unit="B", unit_scale=True, desc="merge", file=sys.stderr) if sys.stderr.isatty() else None
    start = last = time.perf_counter()
    first = -1

    def tell(done: int, total: int) -> None:
        nonlocal last, first
        first = done if first < 0 else first
        if bar is not None:
            bar.total = total
            bar.update(done - bar.n)
            return
        now = time.perf_counter()
        if now - last >= LINE_SECONDS:
            last = now
            speed = (done - first) / 1e9 / (now - start)
            console.say(f"merged {_size(done)} of {_size(total)}, {speed:.2f} GB/s")

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()


def _tell(console: Console, report: MergeReport) -> None:
    if report.was_done:
        console.say(f"{report.out} has this merge already: nothing to do")
        return
    for path in report.moved_aside:
        console.say(f"kept, since no merge wrote it, or it was changed since: {path}")
    kept = f", and {report.kept_files} were finished before" if report.kept_files else ""
    written = len(report.files) - report.kept_files
    console.say(
        f"{report.out}: {report.merged} weights merged{_replaced(report)}; {written} files of weights written{kept}, "
        f"{_size(report.written_bytes)} in {report.seconds:.1f} s, {report.gb_per_second:.2f} GB/s"
    )


def _tell_plan(report: MergeReport) -> None:
    if report.was_done:
        print(f"{report.out} has this merge already: nothing to do")
        return
    print(f"{report.out}: {len(report.files)} files of weights with {report.tensors} tensors")
    print(f"{report.merged} weights would be merged{_replaced(report)}")
    print(
        f"{report.total_bytes / 1e9:.2f} GB would be written; {free_bytes(report.out) / 1e9:.2f} GB are free on the disk"
    )


def _replaced(report: MergeReport) -> str:
    return f", {report.replaced} tensors replaced by trained ones" if report.replaced else ""


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
