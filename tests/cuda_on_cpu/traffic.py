# SPDX-License-Identifier: Apache-2.0
"""The committed table of the global bytes that the passes on tensor cores move, as ``work.py`` has them.

python tests/cuda_on_cpu/traffic.py            rewrites tables/traffic.md
python tests/cuda_on_cpu/traffic.py --count    and counts the table's first shape as a whole (minutes)
"""

from __future__ import annotations

import functools
import operator
import sys
from pathlib import Path

from calls import ELEMENT, PASSES, Shape, arrays_of, run
from compilers import emulated_library
from devices import DEVICES
from emulated import Bytes, Library
from work import READ, WRITTEN, Plan, Work

HERE = Path(__file__).resolve().parent
TABLE = HERE / "tables" / "traffic.md"
KINDS = {
    "activations": ("x", "base", "y", "grad_y", "dx", "weight"),
    "adapters": ("A", "B", "A_general", "B_general"),
    "latents and sums": ("u", "workspace"),
    "gradients": ("dA", "dB", "dA_general", "dB_general"),
    "seed": ("seed",),
}
MAIN = Shape(8192, 4096, 4096, 2, 32)
SHAPES = [
    MAIN,
    Shape(1, 4096, 4096, 2, 32),
    Shape(256, 4096, 4096, 2, 32),
    Shape(65536, 4096, 4096, 2, 32),
    Shape(8192, 4096, 14336, 2, 32),
    Shape(8192, 4096, 4096, 4, 128),
    Shape(8192, 4096, 4096, 2, 32, dtype="fp32"),
    Shape(8192, 4096, 4096, 2, 32, h=8),
    Shape(8192, 4096, 4096, 2, 32, dropout=0.1),
    Shape(8192, 4096, 4096, 2, 32, keep_u=False),
    Shape(8192, 4096, 4096, 2, 32, add_to_dx=True),
]


def work_of(library: Library, shape: Shape, which: str) -> Work:
    """Of the whole pass, cut as launch.h chooses."""
    return total(Plan(shape, *shape.splits(library, which)).work(which))


def total(launches: dict[str, Work]) -> Work:
    return functools.reduce(operator.add, launches.values())


def differences(library: Library, shape: Shape, which: str) -> dict[str, tuple[object, object]]:
    """Where the emulator counts other bytes or mma instructions than the formula, and both numbers."""
    arrays = arrays_of(library, shape, which)
    run(library, shape, which, arrays)
    launches = Plan(shape, *shape.splits(library, which)).work(which)
    assert library.launches() == list(launches)
    work = total(launches)
    both = {
        name: (library.traffic(name), Bytes(work.moved[name, READ], work.moved[name, WRITTEN]))
        for name in [*(name for name, array in arrays.items() if array.size), "seed"]
    }
    both["mma"] = library.statistics().mma, work.mma
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def floor(shape: Shape, which: str) -> int:
    """Each activation once, dx as if it were added to; W read and written."""
    T, N, M, element = shape.T, shape.N, shape.M, ELEMENT[shape.dtype]
    return element * {"forward": T * (N + 2 * M), "backward": T * (M + 3 * N), "merge": 2 * N * M}[which]


def by_kind(work: Work) -> dict[str, int]:
    return {
        kind: sum(work.moved[name, way] for name in names for way in (READ, WRITTEN)) for kind, names in KINDS.items()
    }


def library_of_kernels() -> Library:
    return Library(emulated_library(HERE / "kernels.cu", include=[HERE.parent.parent / "csrc"]))


def megabytes(size: int) -> str:
    digits = 2 if size < 1e6 else 1 if size < 1e7 else 0
    return f"{size / 1e6:.{digits}f}" if size else "–"


def title(s: Shape) -> str:
    more = [f"h={s.h}"] * (s.h > 0) + ["dropout"] * (s.dropout > 0) + ["u made again"] * (not s.keep_u)
    more += ["added to dx"] * s.add_to_dx
    return ", ".join([f"T={s.T} {s.N}×{s.M} r={s.r} k={s.k} {s.dtype}/{s.adapter}", *more])


HEAD = """\
# Global traffic of the passes

Written by `traffic.py`, checked by `test_traffic.py`: the bytes that kernels ask of global memory, in MB (10^6), each access
counted, whichever cache serves it. Activations are x, base, y or grad_y, x, dx, and W in merge; their floor is each once,
dx as if it were added to. Adapters are read again by every tile of 128 tokens, latents by every tile of 64 columns of the
weight gradients: both are small enough for L2. The seed is one address. dtypes: of activations / of the adapter.
"""
COLUMN_TITLES = (
    *("shape", "pass", "launches", "parts of columns, tokens", "floor", "activations", "÷ floor", "adapters"),
    *("÷ activations", "latents and sums", "gradients", "seed"),
)
WHOLE = "\nThe first shape was also run as a whole on the emulator (`--count`), for both devices: the same bytes.\n"


def table(library: Library, *, whole: bool) -> str:
    lines = [HEAD]
    for name, device in DEVICES.items():
        library.device(device.capability, device.multiprocessors)
        lines += [f"\n## {name}: {device.title}\n\n"]
        rows = [COLUMN_TITLES, ["---"] * len(COLUMN_TITLES)]
        for shape in SHAPES:
            rows += [_row(library, shape, which) for which in PASSES if not _repeats(shape, which)]
        lines += ["| " + " | ".join(row) + " |\n" for row in rows]
    library.device()
    return "".join([*lines, WHOLE * whole])


def _repeats(shape: Shape, which: str) -> bool:
    """Merge has no tokens, dropout or u; forward none that is made again."""
    merge_again = which == "merge" and (shape.dropout > 0 or shape.T != MAIN.T)
    return merge_again or ((not shape.keep_u or shape.add_to_dx) and which != "backward")


def _row(library: Library, shape: Shape, which: str) -> list[str]:
    splits = shape.splits(library, which)
    launches = Plan(shape, *splits).work(which)
    kinds, least = by_kind(total(launches)), floor(shape, which)
    activations, adapters = kinds["activations"], kinds["adapters"]
    cut = {"forward": f"{splits[0] or '–'}, –", "backward": f"{splits[0]}, {splits[1]}", "merge": "–"}[which]
    return [
        *(title(shape), which, str(len(launches)), cut, megabytes(least), megabytes(activations)),
        *(f"{activations / least:.2f}", megabytes(adapters), f"{adapters / activations:.2f}"),
        *(megabytes(kinds[kind]) for kind in ("latents and sums", "gradients", "seed")),
    ]


def count_whole(library: Library) -> None:
    """The main shape with all of its tokens and columns"""
    for device in DEVICES.values():
        library.device(device.capability, device.multiprocessors)
        for which in PASSES:
            for name, (count, formula) in differences(library, MAIN, which).items():
                sys.exit(f"{which}, {name}: {count} counted, {formula} by the formula")


def main(arguments: list[str]) -> int:
    whole = arguments == ["--count"]
    if arguments and not whole:
        sys.exit(__doc__)
    library = library_of_kernels()
    library.configure("fifo")
    if whole:
        count_whole(library)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(library, whole=whole), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
