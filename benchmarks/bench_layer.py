"""A whole layer in training: the frozen base layer and its adapter, and what each adapter adds to the base layer.

Ours is one operation here, on AMD's processors one product with W + ΔW; ``ours-path`` is our layer with that switched off, so that
the base layer is called and the path is added to its output. The base layer's backward is dx alone, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor, nn

from gralora_ext import reference

from . import grid, peers
from .accuracy import relative_error
from .bench import Bench, Context, Task
from .data import Data
from .levels import Level
from .results import Record, overhead
from .shapes import Shape, layer_work, training_work
from .timing import Contender

NAME = "layer"
CALL_SECONDS = 2e-11  # for the estimate: a multiply-add of y or dx, on one core
ERROR_TOKENS = 64


def shapes(level: Level) -> list[Shape]:
    """768 tokens, those of ``step``, through widths of real models."""
    if level.name == "tiny":
        return [Shape(48, 32, T=70, r=4, dropout=p) for p in (0.0, 0.1)]
    wide = {"quick": grid.WIDTHS[:2], "default": grid.WIDTHS[:4], "full": grid.WIDTHS}[level.name]
    of_rank = {(16, 2): wide, (64, 4): wide if level.name == "full" else wide[1:2]}
    plain = [Shape(n, m, T=768, r=r, k=k) for (r, k), widths in of_rank.items() for n, m in widths]
    return plain if level.name == "quick" else [*plain, replace(plain[1], dropout=0.1)]


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    return [_task(shape, level, threads) for shape in shapes(level)]


def _task(shape: Shape, level: Level, threads: int) -> Task:
    call = CALL_SECONDS * 2 * shape.T * shape.N * shape.M / threads
    seconds = 0.5 + max(level.seconds, (level.rounds + 3) * 5 * call)
    return Task(f"{NAME}: {shape.key}", seconds, partial(measure, shape))


def measure(shape: Shape, context: Context) -> Iterator[Record]:
    data = Data(shape, context.device)
    weight = data.normal(shape.M, shape.N, dtype=shape.x_dtype, scale=shape.N**-0.5)
    layers = {
        "base": peers.linear(weight),
        "ours": peers.our_layer(data, peers.linear(weight)),
        "ours-path": peers.our_layer(data, peers.linear(weight)),
        "peft": peers.peft_layer(data, peers.linear(weight)),
        "lora": peers.lora_layer(data, peers.linear(weight), peers.lora_factors(data)),
    }
    layers["ours-path"].one_operation = False
    samples = context.interleave(
        {name: Contender(partial(train, layer, data, _trained(layer))) for name, layer in layers.items()}
    )
    case = asdict(shape)
    work = layer_work(shape)
    yield Record(
        bench=NAME,
        key=f"layer {shape.key}",
        unit="s",
        samples=samples,
        case={**case, "what": "layer"},
        errors=_errors(layers, weight, data),
        work=work,
        least=context.floor.least_seconds(work),
    )
    path = training_work(shape)
    yield overhead(NAME, shape.key, samples, case, path, context.floor.least_seconds(path))


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def train(layer: nn.Module, data: Data, parameters: list[nn.Parameter]) -> None:
    """y, dx and the gradients of the layer's parameters."""
    torch.autograd.grad(layer(data.x), (data.x, *parameters), data.grad)


@torch.no_grad()
def _errors(layers: dict[str, nn.Module], weight: Tensor, data: Data) -> dict[str, float]:
    """That of y against the reference in float64, on the first tokens of all; with dropout, of those with our mask."""
    x = data.x.detach().double()[:, :ERROR_TOKENS]
    base = torch.nn.functional.linear(x, weight.double())
    lora = layers["lora"]
    operands = {
        **dict.fromkeys(("ours", "ours-path", "peft"), data.adapter),
        "lora": peers.lora_operands(lora.lora_A["default"].weight, lora.lora_B["default"].weight),
    }
    errors, dropout = {}, data.shape.dropout
    for name, adapter in operands.items():
        if dropout and not name.startswith("ours"):
            continue
        wide = {operand: tensor.double() for operand, tensor in adapter.items()}
        torch.manual_seed(0)
        y = layers[name](data.x)[:, :ERROR_TOKENS]
        torch.manual_seed(0)
        errors[name] = relative_error(y, reference.gralora(x, base, **wide, scaling=peers.SCALING, dropout_p=dropout))
    return errors


BENCH = Bench(NAME, "A whole layer in training, and the overhead over the frozen base layer", tasks)
