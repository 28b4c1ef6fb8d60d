# SPDX-License-Identifier: Apache-2.0
"""torch.compile of whole models: the same numbers, no graph break, and no more graphs than with PEFT's layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from core import Mlp, Outcome, adapt, adapted, batches, difference, reference, relative, sgd, train, trainable
from torch._dynamo.testing import CompileCounter

_BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


def inference(tuner: str, *, hybrid: bool = False) -> Outcome:
    model = adapted(tuner, hybrid=hybrid).eval()
    (ids, *_) = batches()
    with torch.no_grad():
        expected = adapted("lora" if tuner == "lora" else "peft", hybrid=hybrid).eval()(input_ids=ids).logits
        actual = torch.compile(model)(input_ids=ids).logits
    return Outcome(relative(actual, expected))


def training(tuner: str, *, hybrid: bool = False) -> Outcome:
    model = adapted(tuner, hybrid=hybrid).train()
    run = train(torch.compile(model), sgd(trainable(model)), batches())
    return Outcome(difference(run, reference(tuner, hybrid=hybrid)))


def autocast(tuner: str) -> Outcome:
    model = adapted(tuner).train()
    run = train(torch.compile(model), sgd(trainable(model)), batches(), around=_BF16)
    return Outcome(difference(run, reference(tuner)))


def dropout(tuner: str) -> Outcome:
    """Against the tuner's own eager run, whose masks it has: fallback_random is torch's option for that."""
    runs = []
    for compiled in (False, True):
        model = adapted(tuner, dropout=0.3).train()
        torch.manual_seed(5)
        with torch._inductor.config.patch(fallback_random=True):
            runs.append(train(torch.compile(model) if compiled else model, sgd(trainable(model)), batches()))
    return Outcome(difference(runs[1], runs[0]))


def graph_breaks(tuner: str, *, hybrid: bool = False, dropout: float = 0.0, bf16: bool = False) -> Outcome:
    model = adapted(tuner, hybrid=hybrid, dropout=dropout).train()
    (ids, *_) = batches()

    def step(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(input_ids=ids, labels=ids).loss

    breaks = torch._dynamo.explain(step)(ids).graph_break_count
    return Outcome(0.0, breaks, f"{breaks} graph breaks")


def graphs_over_shapes(tuner: str, *, trains: bool, mlp: bool = False, **options: Any) -> Outcome:
    """How often the model is compiled over nine sizes of batches, and how far it is from eager mode."""
    model = adapted(tuner)
    if mlp:
        model = adapt(Mlp(), tuner, target_modules=["first", "second"], task_type=None)
    model.train(trains)
    counter, worst = CompileCounter(), 0.0
    compiled = torch.compile(model, backend=counter, **options)
    with torch.set_grad_enabled(trains):
        for batch, length in ((1, 5), (2, 5), (2, 9), (3, 16), (1, 33), (4, 16), (8, 32), (2, 64), (5, 7)):
            ids = torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(batch))
            actual, expected = (f(ids) if mlp else f(ids).logits for f in (compiled, model))
            worst = max(worst, relative(actual, expected))
    return Outcome(worst, counter.frame_count, f"{counter.frame_count} graphs")


ROWS = {
    "inference": inference,
    "inference, hybrid": partial(inference, hybrid=True),
    "training": training,
    "training, hybrid": partial(training, hybrid=True),
    "training, bf16 autocast": autocast,
    "training, dropout": dropout,
    "graph breaks": graph_breaks,
    "graph breaks, hybrid, dropout, autocast": partial(graph_breaks, hybrid=True, dropout=0.3, bf16=True),
    "graphs over nine shapes, inference": partial(graphs_over_shapes, trains=False),
    "graphs over nine shapes, training": partial(graphs_over_shapes, trains=True),
    "graphs over nine shapes, training, MLP": partial(graphs_over_shapes, trains=True, mlp=True),
    "graphs over nine shapes, dynamic": partial(graphs_over_shapes, trains=True, dynamic=True),
}
