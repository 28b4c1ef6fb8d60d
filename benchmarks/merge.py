# SPDX-License-Identifier: Apache-2.0
"""Merging an adapter into its layer's weight, and unmerging it: time, error, and the peak of extra memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from gralora_ext import reference

from . import contenders as peers
from .bench import Bench, Context, Level, Skip, Task
from .contenders import Data, relative_error
from .memory import MERGED, SECONDS, peaks
from .path import CALL_SECONDS
from .results import Record
from .shapes import Shape, merge_work

NAME = "merge"
ROWS = 16  # of each output block: what an error is taken on
WIDTHS = {
    "tiny": ((24, 36),),
    "quick": ((2048, 2048),),
    "default": ((2048, 2048), (4096, 4096), (4096, 14336)),
    "full": ((2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096)),
}


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    # T = 1, since a merge sees no tokens; the adapter stays in float32 beside a 16-bit weight, as
    # PEFT keeps it.
    shapes = [
        Shape(n, m, T=1, r=4 if level.name == "tiny" else 32, activation=dtype)
        for n, m in WIDTHS[level.name]
        for dtype in ("fp32", "bf16")
    ]
    return [
        Task(f"{NAME}: {case_key(s)}", expected_seconds(s, level), partial(measure, s), memory=10 * 4 * s.N * s.M)
        for s in shapes
    ]


def case_key(shape: Shape) -> str:
    return f"{shape.N}x{shape.M} r={shape.r} k={shape.k} {shape.activation}"


def expected_seconds(shape: Shape, level: Level) -> float:
    pair = 4 * 2 * 2 * CALL_SECONDS * shape.N * shape.M  # four contenders, there and back, each writing M × N twice
    return SECONDS + 10 * pair + 2 * max(level.seconds, (level.rounds + 2) * pair)


def measure(shape: Shape, context: Context) -> Iterator[Record]:
    data = Data(shape, context.device)
    adapted = peers.with_weights_of_their_own(peers.layers(data, *MERGED, "ours-plain"))
    errors = {name: merge_error(layer, data) for name, layer in adapted.items()}
    work = merge_work(shape)
    case = asdict(shape)
    for what, contenders in (("merge", peers.merges(adapted)), ("unmerge", peers.unmerges(adapted))):
        with torch.no_grad():
            samples = context.interleave(contenders)
        yield Record(
            bench=NAME,
            key=f"{what} {case_key(shape)}",
            unit="s",
            samples=samples,
            case={**case, "what": what},
            errors=errors if what == "merge" else {},
            work=work,
            least=context.floor.least_seconds(work),
        )
    try:
        peak = peaks("merge", shape, context.device, context.threads)
    except Skip as reason:
        context.skipped["peak memory"] = str(reason)
        return
    samples = {name: [float(value)] for name, value in peak.items()}
    yield Record(NAME, f"peak of merge {case_key(shape)}", "bytes", samples, {**case, "what": "peak"})


def merge_error(layer: nn.Module, data: Data) -> float:
    """``‖W' − (W + dW)‖ / ‖W + dW‖`` of a merge, on the first rows of each output block; unmerges again."""
    weight = layer.get_base_layer().weight
    if hasattr(layer, "lora_A"):
        operands = peers.lora_operands(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    else:
        operands = data.adapter
    wide = {name: tensor.detach().double() for name, tensor in operands.items()}
    k = wide["A"].shape[0]

    def rows(matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, (k, -1))[:, :ROWS].flatten(0, 1)

    wide["B"] = wide["B"][:, :, :ROWS]
    if "B_general" in wide:
        wide["B_general"] = rows(wide["B_general"])
    with torch.no_grad():
        expected = rows(weight).double() + reference.delta_weight(**wide, scaling=peers.SCALING)
        layer.merge()
        error = relative_error(rows(weight), expected)
        layer.unmerge()
    return error


BENCH = Bench(NAME, "Merge and unmerge", tasks)
