# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: the command line of the suite. Arguments are checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

from gralora_ext.program.errors import JobError

BENCHES = (
    "forward",
    "training",
    "layer",
    "merge",
    "memory",
    "mixed",
    "calls",
    "inference",
    "threads",
    "growth",
    "layers",
    "step",
)
NEEDED = ("torch", "peft", "transformers", "matplotlib", "tqdm")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise JobError(message)


def main(argv: list[str]) -> int:
    """Runs ``argv`` and returns the exit code.

    0; 1 where a case failed or (if asked) regressed, or a document's tables are not those of the
    results; 2 for what the user can mend; 130 where the run was stopped.
    """
    try:
        command = {"compare": _compare, "report": _report}.get(argv[0] if argv else "")
        return command(argv[1:]) if command else _run(argv)
    except JobError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    options = parse(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise JobError(f"the benchmarks need {', '.join(missing)}: `pip install {' '.join(missing)}`")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; the run's own is lines then
    from .run import run

    return run(options)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of a run."""
    parser = Parser(
        "python -m benchmarks",
        description="Measures gralora_ext beside its peers; `compare A B` compares two runs, `report` writes the documents' tables.",
        allow_abbrev=False,
    )
    level = parser.add_mutually_exclusive_group()
    for name, text in (("quick", "less than 3 minutes on two cores"), ("full", "up to an hour")):
        level.add_argument(f"--{name}", dest="level", action="store_const", const=name, help=text)
    level.add_argument("--tiny", dest="level", action="store_const", const="tiny", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--only", nargs="+", choices=BENCHES, default=BENCHES, metavar="NAME", help=f"some of {', '.join(BENCHES)}"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write (default: a new folder in runs/benchmarks)"
    )
    parser.set_defaults(level="default")
    options = parser.parse_args(argv)
    options.only = [name for name in BENCHES if name in options.only]
    return options


def _compare(argv: list[str]) -> int:
    parser = Parser(
        "python -m benchmarks compare",
        description="Prints which medians of run A changed in run B by more than the spread of both and 5 %.",
        allow_abbrev=False,
    )
    for name in "AB":
        parser.add_argument(name, type=Path, help="results.json of a run, or its folder")
    parser.add_argument(
        "--fail-on-regression", action="store_true", help="exit code 1 where a kernel of ours regressed"
    )
    options = parser.parse_args(argv)
    from .results import load
    from .tables import compare, comparison_text

    comparison = compare(load(options.A), load(options.B))
    print(comparison_text(comparison))
    return 1 if options.fail_on_regression and comparison.we_regressed else 0


def _report(argv: list[str]) -> int:
    parser = Parser(
        "python -m benchmarks report",
        description="Writes the tables between `<!-- figures: NAME -->` and `<!-- end of figures -->` from committed results.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "documents", nargs="*", type=Path, metavar="FILE", help="Markdown (default: README.md and docs/)"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="a folder of runs (default: benchmarks/results)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table differs")
    options = parser.parse_args(argv)
    from .report import report

    return report(options.documents, options.results, check=options.check)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but it is {value}")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
