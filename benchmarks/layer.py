# SPDX-License-Identifier: Apache-2.0
"""A whole layer, frozen base layer and adapter: in training, with one token, and what a call costs.

In training ours is one operation here, on AMD's processors one product with W + ΔW, an idea of
RunLoRA (arXiv 2312.03415), which chooses X(W + AB) by its FLOPs. ``ours-path`` is our layer with
that switched off: the base layer is called, and the path is added to its output. The base layer's
backward is dx alone. The overhead of a contender is its time minus that of the base layer, round by
round; with one token, as in generation, it is mostly fixed cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from gralora_ext import reference

from . import contenders as peers
from . import path
from .bench import Bench, Context, Level, Task
from .contenders import TOKENS, Data, paths, relative_error
from .results import Record, overhead
from .shapes import SQUARE, WIDTHS, Shape, forward_work, layer_work, training_work
from .timing import Contender

CALL_SECONDS = 2e-11  # for the estimate: a multiply-add of y or dx, on one core


def shapes(level: Level) -> list[Shape]:
    """768 tokens, those of ``step``, through widths of real models."""
    if level.name == "tiny":
        return [Shape(48, 32, T=70, r=4, dropout=p) for p in (0.0, 0.1)]
    wide = {"quick": WIDTHS[:2], "default": WIDTHS[:4], "full": WIDTHS}[level.name]
    of_rank = {(16, 2): wide, (64, 4): wide if level.name == "full" else wide[1:2]}
    plain = [Shape(n, m, T=768, r=r, k=k) for (r, k), widths in of_rank.items() for n, m in widths]
    return plain if level.name == "quick" else [*plain, replace(plain[1], dropout=0.1)]


def layer_tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    return [_task(shape, level, threads) for shape in shapes(level)]


def _task(shape: Shape, level: Level, threads: int) -> Task:
    call = CALL_SECONDS * 2 * shape.T * shape.N * shape.M / threads
    seconds = 0.5 + max(level.seconds, (level.rounds + 3) * 5 * call)
    return Task(f"layer: {shape.key}", seconds, partial(measure_layer, shape))


def measure_layer(shape: Shape, context: Context) -> Iterator[Record]:
    data = Data(shape, context.device)
    layers = peers.layers(data, "base", "ours", "ours-path", "peft", "lora")
    samples = context.interleave(
        {name: Contender(partial(train, layer, data, _trained(layer))) for name, layer in layers.items()}
    )
    case = asdict(shape)
    work = layer_work(shape)
    yield Record(
        bench="layer",
        key=f"layer {shape.key}",
        unit="s",
        samples=samples,
        case={**case, "what": "layer"},
        errors=_errors(layers, data),
        work=work,
        least=context.floor.least_seconds(work),
    )
    of_path = training_work(shape)
    yield overhead("layer", shape.key, samples, case, of_path, context.floor.least_seconds(of_path))


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def train(layer: nn.Module, data: Data, parameters: list[nn.Parameter]) -> None:
    """y, dx and the gradients of the layer's parameters."""
    torch.autograd.grad(layer(data.x), (data.x, *parameters), data.grad)


@torch.no_grad()
def _errors(layers: dict[str, nn.Module], data: Data) -> dict[str, float]:
    """That of y against the reference in float64, on the first tokens of all; with dropout, of those with our mask."""
    x = data.x.detach().double()[:, :TOKENS]
    base = torch.nn.functional.linear(x, layers["base"].weight.double())
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
        y = layers[name](data.x)[:, :TOKENS]
        torch.manual_seed(0)
        errors[name] = relative_error(y, reference.gralora(x, base, **wide, scaling=peers.SCALING, dropout_p=dropout))
    return errors


# One token, as in generation

ONE_TOKEN_WIDTHS = {
    "tiny": ((24, 36),),
    "quick": ((576, 576), (2048, 2048)),
    "default": WIDTHS[:5],
    "full": WIDTHS,
}


def inference_tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    rank = 4 if level.name == "tiny" else 16
    shapes = [Shape(n, m, T=1, r=rank) for n, m in ONE_TOKEN_WIDTHS[level.name]]
    if level.name in ("default", "full"):
        shapes.append(Shape(2048, 2048, T=1, r=rank // 2, h=rank // 2))
    return [Task(f"inference: {shape.key}", level.seconds + 0.5, partial(measure_inference, shape)) for shape in shapes]


def measure_inference(shape: Shape, context: Context) -> Iterator[Record]:
    data = Data(shape, context.device)
    layers = peers.layers(data, "base", "ours", "peft", "lora")
    with torch.no_grad():
        samples = context.interleave({name: Contender(partial(layer.eval(), data.x)) for name, layer in layers.items()})
    case = asdict(shape)
    yield Record("inference", f"layer {shape.key}", "s", samples, {**case, "what": "layer"})
    work = forward_work(shape)
    yield overhead("inference", shape.key, samples, case, work, context.floor.least_seconds(work))


# What a call costs beside its arithmetic. Twice: again and again, and after a training step of a
# large layer (PEFT's), which leaves nothing of the interpreter's, torch's and our own data and code
# in the caches; so it is in a model, where products lie between the calls. ``autograd`` is
# ``torch.neg`` and its gradient: what torch takes for the least that can be differentiated.

TINY = Shape(16, 16, T=1, r=4)
SHARE = 0.5  # of a case's time: calls are short, so there are many rounds all the same
BETWEEN = {"tiny": Shape(24, 36, T=3, r=4)}  # else SQUARE


def calls_tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    if device.type != "cpu":
        return []
    between = BETWEEN.get(level.name, SQUARE)
    return [
        Task(f"calls: {what}, {when}", SHARE * level.seconds + 0.2, partial(measure_calls, what, when, between))
        for what in ("forward", "training")
        for when in ("warm", "after a large layer")
    ]


def measure_calls(what: str, when: str, between: Shape, context: Context) -> Iterator[Record]:
    data, large = Data(TINY, context.device), Data(between, context.device)
    training = what == "training"
    calls: dict[Any, Callable[[], None]] = {
        name: partial(path.train if training else path.forward, peer, data) for name, peer in paths(data).items()
    }
    calls["autograd"] = partial(_least, data.x, training)
    large_step = torch.enable_grad()(partial(path.train, paths(large)["peft"], large))
    prepare = None if when == "warm" else large_step
    shorter = replace(context, level=replace(context.level, seconds=SHARE * context.level.seconds))
    with torch.set_grad_enabled(training):
        samples = shorter.interleave({name: Contender(call, prepare) for name, call in calls.items()})
    yield Record("calls", f"{what}, {when}", "s", samples, {**asdict(TINY), "what": what, "when": when})


def _least(x: torch.Tensor, training: bool) -> None:
    y = torch.neg(x)
    if training:
        torch.autograd.grad(y, (x,), y)


BENCHES = (
    Bench("layer", "A whole layer in training, and the overhead over the frozen base layer", layer_tasks),
    Bench("inference", "One token through a layer, and the overhead over the base layer", inference_tasks),
    Bench("calls", "What a call costs, in caches and out of them", calls_tasks),
)
