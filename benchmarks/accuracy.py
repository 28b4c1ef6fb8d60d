"""The error of a contender against :mod:`gralora_ext.reference` in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from gralora_ext import reference

from .data import SEED, Data
from .peers import SCALING, Path

TOKENS = 64  # with the gradient of y zero beyond them, all results are those of the first so many tokens


def path_error(path: Path, data: Data, *, gradients: bool) -> float | None:
    """The greatest ``‖actual − expected‖ / ‖expected‖`` of y and, with ``gradients``, of dx and the adapter's gradients.

    The contender runs on all tokens, the reference on the first ``TOKENS``. None where the contender draws a dropout
    mask that the reference does not know.
    """
    s = data.shape
    if s.dropout and not path.our_dropout:
        return None
    rows = min(s.T, TOKENS)
    grad = data.grad.clone()
    grad[:, rows:] = 0
    with torch.set_grad_enabled(gradients):
        torch.manual_seed(SEED)
        y = path.call(data.x, data.base.clone())
        actual = [y[:, :rows]]
        if gradients:
            dx, *rest = torch.autograd.grad(y, (data.x, *path.parameters), grad)
            actual += [dx[:, :rows], *rest]
        torch.manual_seed(SEED)
        x, *parameters = (t.detach().double().requires_grad_(gradients) for t in (data.x[:, :rows], *path.parameters))
        y = reference.gralora(
            x, data.base[:, :rows].double(), **path.operands(*parameters), scaling=SCALING, dropout_p=s.dropout
        )
        expected = [y]
        if gradients:
            expected += torch.autograd.grad(y, (x, *parameters), grad[:, :rows].double())
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in float64."""
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()
