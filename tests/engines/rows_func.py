# SPDX-License-Identifier: Apache-2.0
"""torch.func: grad, jvp, vmap and vmap over grad, each through functional_call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from core import Mlp, Outcome, adapt, relative
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

Tensors = dict[str, Tensor]


def model_of(tuner: str, hybrid: bool) -> nn.Module:
    return adapt(Mlp(), tuner, hybrid=hybrid, target_modules=["first", "second"], task_type=None).train()


def parts(model: nn.Module) -> tuple[Tensors, Tensor, Callable[[Tensors, Tensor], Tensor]]:
    """The trainable parameters, six sequences of 16 tokens, and the loss of sequences as a function of parameters."""
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ids = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(1))

    def loss(values: Tensors, ids: Tensor) -> Tensor:
        return functional_call(model, values, (ids,)).square().mean()

    return parameters, ids, loss


def worst(actual: Tensors, expected: Tensors) -> float:
    return max(relative(actual[name], value) for name, value in expected.items())


def plain_gradients(tuner: str, hybrid: bool, ids: Tensor) -> Tensors:
    """By backward, and for GraLoRA with PEFT's layer."""
    model = model_of("lora" if tuner == "lora" else "peft", hybrid)
    model(ids).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_grad(tuner: str, hybrid: bool = False) -> Outcome:
    parameters, ids, loss = parts(model_of(tuner, hybrid))
    return Outcome(worst(grad(loss)(parameters, ids), plain_gradients(tuner, hybrid, ids)))


def run_grad_hybrid(tuner: str) -> Outcome:
    return run_grad(tuner, hybrid=True)


def run_vmap_grad(tuner: str) -> Outcome:
    """The gradients of each sequence."""
    parameters, ids, loss = parts(model_of(tuner, False))
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, ids[:, None])
    return Outcome(
        max(
            worst({name: g[i] for name, g in each.items()}, plain_gradients(tuner, False, ids[i : i + 1]))
            for i in range(len(ids))
        )
    )


def run_vmap(tuner: str) -> Outcome:
    model = model_of(tuner, False)
    _, ids, _ = parts(model)
    expected = model_of("lora" if tuner == "lora" else "peft", False)(ids)
    return Outcome(relative(vmap(model, in_dims=0)(ids), expected))


def run_jvp(tuner: str) -> Outcome:
    """Along a random direction, the sum of the products with the gradients."""
    parameters, ids, loss = parts(model_of(tuner, False))
    generator = torch.Generator().manual_seed(2)
    direction = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    _, slope = jvp(lambda values: loss(values, ids), (parameters,), (direction,))
    expected = plain_gradients(tuner, False, ids)
    return Outcome(relative(slope, sum((direction[name] * g).sum() for name, g in expected.items())))


def run_functional_call(tuner: str) -> Outcome:
    """Backward through other parameters than the model's own."""
    model = model_of(tuner, False)
    parameters, ids, loss = parts(model)
    values = {name: p.requires_grad_() for name, p in parameters.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.requires_grad else 1.0)
    found = dict(zip(values, torch.autograd.grad(loss(values, ids), list(values.values())), strict=True))
    return Outcome(worst(found, plain_gradients(tuner, False, ids)))


ROWS = {
    "functional_call": run_functional_call,
    "grad": run_grad,
    "grad, hybrid": run_grad_hybrid,
    "jvp": run_jvp,
    "vmap": run_vmap,
    "vmap over grad": run_vmap_grad,
}
