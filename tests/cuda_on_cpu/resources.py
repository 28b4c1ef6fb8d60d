# SPDX-License-Identifier: Apache-2.0
"""The committed table of what each kernel takes of a multiprocessor, and of how long it would take at the device's limits.

python tests/cuda_on_cpu/resources.py    rewrites tables/resources.md; needs nvcc
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import compilers
from calls import PASSES, Shape, arrays_of, run
from devices import DEVICES, Device
from emulated import Launched, Library
from traffic import MAIN, floor, library_of_kernels, megabytes, title
from work import Plan

HERE = Path(__file__).resolve().parent
TABLE = HERE / "tables" / "resources.md"
DTYPES = [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp16", "fp16")]
DTYPES += [("fp32", adapter) for adapter in ("fp32", "bf16", "fp16")]
RANKS = (16, 32, 64)  # the widths that the kernels have
PRE_AMPERE = (75, 40)


HEAD = """\
# What the kernels take

Written by `resources.py`, checked by `test_resources.py`.
"""
MODEL = f"""
## Modelled times, {title(MAIN)}

No measurement: the longer of bytes / bandwidth and FLOPs / peak. Bytes of memory are those that a kernel asks for, without
those that it asks for again, of adapters, latents and sums (they fit into L2). FLOPs are those of the mma instructions that
run, all pairs of pieces.
"""


@dataclass(frozen=True)
class Assembled:
    registers: int
    static_bytes: int


def assembled(arch: int) -> dict[str, Assembled]:
    """All kernels of the four sources by their mangled names."""
    log = compilers.kernels_cubin(arch).log
    kernels = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers([^\n]*)", log, re.DOTALL)
    found = {}
    for symbol, registers, rest in kernels:
        static = re.search(r"(\d+) bytes smem", rest)
        found[symbol] = Assembled(int(registers), int(static[1]) if static else 0)
    return {symbol: kernel for symbol, kernel in found.items() if "mask_kernel" not in symbol}  # of the tests


def launched(library: Library) -> dict[str, Launched]:
    """A launch of each kernel that there is, by its mangled name."""
    launches = {}
    for shape, capability in _all_ways():
        library.device(*capability)
        for which in PASSES:
            run(library, shape, which, arrays_of(library, shape, which))
            launches.update((launch.symbol, launch) for launch in library.launched())
    library.device()
    return launches


def _all_ways() -> Iterator[tuple[Shape, tuple[int, int]]]:
    for dtype, adapter in DTYPES:
        for r in RANKS:
            yield Shape(1, 64, 64, 1, r, dtype=dtype, adapter=adapter), (80, 108)
    for dtype in ("fp32", "fp64"):
        yield Shape(1, 8, 8, 1, 2, dtype=dtype, adapter=dtype), PRE_AMPERE


def short_names(symbols: list[str]) -> dict[str, str]:
    """Such as ``project<bf16, fp32, 32>``"""
    plain = subprocess.run(["c++filt", *symbols], check=True, capture_output=True, text=True).stdout.splitlines()
    spelled = {"gralora::cuda::": "", "_kernel": "", "__nv_bfloat16": "bf16", "__half": "fp16", "void ": ""}
    spelled |= {"float": "fp32", "double": "fp64"}
    names = {}
    for symbol, name in zip(symbols, plain, strict=True):
        name = name.replace("(anonymous namespace)::", "").split("(")[0]
        for long, short in spelled.items():
            name = name.replace(long, short)
        names[symbol] = name
    return names


def blocks_of(kernel: Assembled, launch: Launched, device: Device) -> int:
    """That a multiprocessor holds at once"""
    occupancy = ctypes.CDLL(str(compilers.emulated_library(HERE / "occupancy.cpp")))
    return occupancy.blocks_of_a_multiprocessor(
        *(device.capability, 1024 * device.shared, 1024 * device.shared_of_block),
        *(launch.block[0], kernel.registers, kernel.static_bytes, launch.dynamic_bytes),
    )


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def kernels_section(library: Library) -> str:
    launches = launched(library)
    names = short_names(sorted(launches))
    titles, columns = ["kernel", "threads"], []
    for device in DEVICES.values():
        titles += [f"sm_{device.capability}: registers", "shared", "blocks", "warps"]
        columns.append((device, assembled(device.capability)))
    lines = [
        f"\n## Kernels, by nvcc {compilers.nvcc_version()}\n\n",
        "Registers of a thread, shared memory of a block in bytes, and how many blocks and warps a multiprocessor holds.\n\n",
        row(titles),
        row(["---"] * len(titles)),
    ]
    for symbol in sorted(launches, key=lambda symbol: _order(names[symbol])):
        launch = launches[symbol]
        cells = [f"`{names[symbol]}`", str(launch.block[0])]
        for device, kernels in columns:
            kernel = kernels[symbol]
            blocks = blocks_of(kernel, launch, device)
            shared = kernel.static_bytes + launch.dynamic_bytes
            cells += [str(kernel.registers), str(shared), str(blocks), str(blocks * launch.block[0] // 32)]
        lines.append(row(cells))
    return "".join(lines)


def _order(name: str) -> tuple[str | int, ...]:
    """Numbers by their value"""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(?<= )(\d+)", name))


def kernels_of(library: Library, plan: Plan, which: str) -> list[str]:
    """The names of the kernels that a pass launches"""
    cut = {"columns": plan.column_splits, "tokens": plan.token_splits}
    small = replace(plan.shape, T=1, N=128, M=128, **cut)
    run(library, small, which, arrays_of(library, small, which))
    symbols = [launch.symbol for launch in library.launched()]
    return [short_names(symbols)[symbol] for symbol in symbols]


def model_section(library: Library) -> str:
    titles = [
        "pass",
        "kernel",
        "MB of memory",
        "MB asked",
        "memory, µs",
        "GFLOP",
        "tensor cores, µs",
        "modelled, µs",
    ]
    lines = [MODEL]
    for name, device in DEVICES.items():
        limits = f"{device.bandwidth / 1e12:g} TB/s, {device.peak / 1e12:g} TFLOP/s"
        lines += [f"\n### {name}: {limits}\n\n", row(titles), row(["---"] * len(titles))]
        library.device(device.capability, device.multiprocessors)
        for which in PASSES:
            total = 0.0
            plan = Plan(MAIN, *MAIN.splits(library, which))
            kernels = kernels_of(library, plan, which)
            for work, kernel in zip(plan.work(which).values(), kernels, strict=True):
                asked = sum(work.moved.values())
                memory = asked - sum(work.again.values())
                times = 1e6 * memory / device.bandwidth, 1e6 * work.flops / device.peak
                total += max(times)
                lines.append(
                    row(
                        [
                            *(which, f"`{kernel}`", megabytes(memory), megabytes(asked), f"{times[0]:.1f}"),
                            *(f"{work.flops / 1e9:.1f}", f"{times[1]:.1f}", f"{max(times):.1f}"),
                        ]
                    )
                )
            least = 1e6 * floor(MAIN, which) / device.bandwidth
            whole = f"all; {total / least:.2f} of the floor's {least:.1f}"
            lines.append(row([which, whole, *[""] * 5, f"{total:.1f}"]))
    library.device()
    return "".join(lines)


def table(library: Library) -> str:
    return HEAD + kernels_section(library) + model_section(library)


def main() -> int:
    library = library_of_kernels()
    library.configure("fifo")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(library), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
