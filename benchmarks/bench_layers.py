"""All adapted layers of SmolLM2-135M in training, one after another: what an adapter adds to them, on a machine that others use too.

A step takes seconds, and what other guests of a host do in that time is more than what an adapter costs (bench ``step``). Here contenders
take turns after every layer, some milliseconds. Each is at another place of the model, so that it finds nothing in a cache that the
others left there: x, the gradient of y and the weights come from memory, as in a step. Norms, attention and loss are left out.
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from gralora_ext.cli.memory import keep_freed_memory

from . import bench_step
from .bench import Bench, Context, Task
from .data import SEED
from .levels import Level
from .results import Record
from .timing import Samples

NAME = "layers"
ROUND_SECONDS = 3.5  # for the estimate: all layers with 768 tokens on one core of today's servers

# The levels' tokens, (r, k) of the adapters, and rounds; LoRA is measured at the same r.
SETTINGS = {
    "tiny": (70, ((4, 2),), 2),
    "quick": (192, ((16, 2),), 2),
    "default": (768, ((16, 2),), 3),
    "full": (768, ((16, 2), (64, 4)), 12),
}


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    if device.type != "cpu":
        return []
    tokens, adapters, rounds = SETTINGS[level.name]
    contenders = 1 + len(bench_step.ADAPTED)
    seconds = 8 + contenders * (rounds + 1) * ROUND_SECONDS / threads * tokens / 768
    return [
        Task(f"{NAME}: {_key(tokens, *setting)}", seconds, partial(measure, tokens, *setting, rounds), memory=6 << 30)
        for setting in adapters
    ]


def measure(tokens: int, r: int, k: int, rounds: int, context: Context) -> Iterator[Record]:
    keep_freed_memory()
    frozen = bench_step.frozen_model().requires_grad_(False)
    models = {"base": frozen, **{name: bench_step.adapted(frozen, name, r, k) for name in bench_step.ADAPTED}}
    samples = in_turns({name: bench_step.adapted_layers(model) for name, model in models.items()}, tokens, rounds)
    works = bench_step.layer_works(frozen, r, k, tokens)
    case = {"setting": f"r={r} k={k}", "tokens": tokens}
    yield Record(NAME, f"layers {_key(tokens, r, k)}", "s", samples, {**case, "what": "layers"})
    yield bench_step.overhead_of_adapters(NAME, _key(tokens, r, k), samples, case, works, context.floor)


def _key(tokens: int, r: int, k: int) -> str:
    return f"T={tokens} r={r} k={k}"


def in_turns(layers: dict[str, list[nn.Module]], tokens: int, rounds: int) -> Samples:
    """Seconds that forward and backward of all layers take together, a sum for each round; an unmeasured round comes first."""
    count, kinds = len(layers["base"]), len(bench_step.PROJECTIONS)
    generator = torch.Generator().manual_seed(SEED)
    inputs, gradients = (
        [torch.randn(1, tokens, getattr(layer, width), generator=generator) for layer in layers["base"]]
        for width in ("in_features", "out_features")
    )
    apart = count // kinds // len(layers) * kinds  # so all of a turn are at layers of one kind
    order = [(name, place * apart) for place, name in enumerate(layers)]
    shuffle = random.Random(0).shuffle
    samples: Samples = {name: [0.0] * rounds for name in layers}
    gc.collect()
    gc.disable()
    try:
        for turn, i in itertools.product(range(-1, rounds), range(count)):
            shuffle(order)
            for name, ahead in order:
                at = (i + ahead) % count
                seconds = _train(layers[name][at], inputs[at].detach().requires_grad_(), gradients[at])
                if turn >= 0:
                    samples[name][turn] += seconds
    finally:
        gc.enable()
    return samples


def _train(layer: nn.Module, x: Tensor, gradient: Tensor) -> float:
    start = time.perf_counter()
    layer(x).backward(gradient)
    seconds = time.perf_counter() - start
    layer.zero_grad(set_to_none=True)
    return seconds


BENCH = Bench(NAME, "All adapted layers of SmolLM2-135M in training, one after another", tasks)
