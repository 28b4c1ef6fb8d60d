# SPDX-License-Identifier: Apache-2.0
"""Batches in which each row has its adapter (``adapter_names``), beside PEFT's LoRA with as many parameters.

Four linear layers of one width, one after another, without the rest of a model. PEFT's GraLoRA
takes such a batch and ignores the names, so it is no contender.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from peft import GraloraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import gralora_ext
from gralora_ext import reference

from .bench import Bench, Context, Level, Task
from .contenders import relative_error
from .results import Record
from .shapes import Shape
from .timing import Contender

NAME = "mixed"
LAYERS = 4
ADAPTERS = (1, 4, 16)
ORDERS = {"together": lambda row, rows, n: row * n // rows, "in turns": lambda row, rows, n: row % n}
SHAPE = Shape(1024, 1024, T=16 * 64, r=16, k=2)
CALL_SECONDS = 2e-11  # a multiply-add, for the estimate


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    rows = 4 if level.name == "tiny" else 16
    shape = Shape(48, 48, T=4 * 4, r=4) if level.name == "tiny" else SHAPE
    call = LAYERS * CALL_SECONDS * shape.T * shape.N * shape.M / threads
    return [
        Task(
            f"{NAME}: {n} adapters, {order}",
            1 + max(level.seconds, (level.rounds + 3) * 4 * call),
            partial(measure, shape, rows, n, order),
        )
        for n in ADAPTERS[: 2 if level.name == "quick" else None]
        if n <= rows
        for order in (ORDERS if n > 1 else ["together"])
    ]


def measure(shape: Shape, rows: int, n: int, order: str, context: Context) -> Iterator[Record]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, shape.T // rows, shape.N, generator=generator).to(context.device)
    names = [f"adapter{ORDERS[order](row, rows, n)}" for row in range(rows)]
    rank = {"r": shape.r, "target_modules": [f"layer{i}" for i in range(LAYERS)]}
    with gralora_ext.enable():
        ours = adapted(n, shape.N, GraloraConfig(**rank, gralora_k=shape.k, init_weights=False), context.device)
    lora = adapted(n, shape.N, LoraConfig(**rank, init_lora_weights=False), context.device)
    base = plain(shape.N).to(context.device)
    with torch.no_grad():
        error = relative_error(ours(x, adapter_names=names), expected(ours, x, names))
        samples = context.interleave(
            {
                "base": Contender(partial(base, x)),
                "ours": Contender(partial(ours, x, adapter_names=names)),
                "lora": Contender(partial(lora, x, adapter_names=names)),
            }
        )
    case = {**asdict(shape), "what": NAME, "rows": rows, "adapters": n, "order": order}
    yield Record(NAME, f"{n} adapters, {order}, {shape.key}", "s", samples, case, errors={"ours": error})


def plain(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict((f"layer{i}", nn.Linear(width, width)) for i in range(LAYERS)))


def adapted(n: int, width: int, config: Any, device: torch.device) -> PeftModel:
    model = get_peft_model(plain(width), config, adapter_name="adapter0")
    for i in range(1, n):
        model.add_adapter(f"adapter{i}", config)
    return model.to(device).eval()


def expected(model: PeftModel, x: Tensor, names: list[str]) -> Tensor:
    """The output row by row, in float64."""
    x = x.double()
    for layer in model.base_model.model:
        base = layer.get_base_layer()
        y = nn.functional.linear(x, base.weight.double(), base.bias.double())
        x = torch.stack(
            [
                reference.gralora(
                    row,
                    of_base,
                    layer.gralora_A[name].double(),
                    layer.gralora_B[name].double(),
                    scaling=layer.scaling[name],
                )
                for row, of_base, name in zip(x, y, names, strict=True)
            ]
        )
    return x


BENCH = Bench(NAME, "Batches in which each row has its adapter, through four layers", tasks)
