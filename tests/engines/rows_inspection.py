# SPDX-License-Identifier: Apache-2.0
"""What looks at a model or copies it: FlopCounterMode, jit.trace, deepcopy, pickle, torch.save."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial

import torch
from core import Outcome, adapt, adapted, batches, difference, reference, relative, sgd, train, trainable
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_TOKENS, _IN, _OUT, _R, _H = 96, 64, 128, 8, 4


class Layer(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(_IN, _OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def layer_of(tuner: str, hybrid: bool = False) -> nn.Module:
    return adapt(Layer(), tuner, hybrid=hybrid, target_modules=["linear"], task_type=None)


def flops(tuner: str, *, hybrid: bool = False) -> Outcome:
    """Forward: 2NM + 2(r + h)(N + M) per token; backward, for dx, dA and dB: 2NM + 4(r + h)(N + M)."""
    model = layer_of(tuner, hybrid).train()
    x = torch.randn(_TOKENS, _IN, requires_grad=True)
    path = 2 * (_R + (_H if hybrid else 0)) * (_IN + _OUT) * _TOKENS
    layer = 2 * _IN * _OUT * _TOKENS
    with FlopCounterMode(display=False) as forward:
        y = model(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    ratios = forward.get_total_flops() / (layer + path), backward.get_total_flops() / (layer + 2 * path)
    return Outcome(max(abs(ratio - 1) for ratio in ratios), note="counted / expected: {:.3f}, {:.3f}".format(*ratios))


def trace(tuner: str, *, hybrid: bool = False) -> Outcome:
    """Traced with 12 tokens, called with 80; the warnings of the tuner's own code are counted."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(layer_of(tuner, hybrid).eval(), torch.randn(3, 4, _IN))
        own = [w for w in caught if f"{'gralora_ext' if tuner == 'ours' else 'peft'}/" in w.filename]
        x = torch.randn(5, 16, _IN)
        distance = relative(traced(x), layer_of("lora" if tuner == "lora" else "peft", hybrid).eval()(x))
    if tuner == "ours" and own:
        raise AssertionError(f"our code warns: {own[0].message}")
    return Outcome(distance, len(own), f"{len(own)} warnings")


def through_memory(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def duplicate(tuner: str, *, how: Callable[[nn.Module], nn.Module]) -> Outcome:
    """A copy of a model that has been called is trained; the model itself must stay as it was."""
    model = adapted(tuner, hybrid=True).train()
    (ids, *_) = batches()
    before = model(input_ids=ids).logits.detach()
    model.zero_grad()
    twin = how(model)
    distance = difference(train(twin, sgd(trainable(twin)), batches()), reference(tuner, hybrid=True))
    return Outcome(max(distance, relative(model(input_ids=ids).logits, before)))


ROWS = {
    "FLOPs": flops,
    "FLOPs, hybrid": partial(flops, hybrid=True),
    "jit.trace": trace,
    "jit.trace, hybrid": partial(trace, hybrid=True),
    "deepcopy": partial(duplicate, how=copy.deepcopy),
    "pickle": partial(duplicate, how=lambda model: pickle.loads(pickle.dumps(model))),
    "torch.save": partial(duplicate, how=through_memory),
}
