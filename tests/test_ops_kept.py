# SPDX-License-Identifier: Apache-2.0
"""What forward keeps for backward, by one rule: the ops, the checks of backward and the fake implementations agree on it."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DTYPES, NAMES, Case, assert_near, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gralora_ext.ops  # noqa: F401  registers the operations
from gralora_ext.tolerances import tolerance

MIXES = tuple(itertools.product(DTYPES, repeat=3))
# Beside float32 adapters a 16-bit x of 96 columns keeps U of at most 6 ranks, of which there are
# four times as many as here.
RANKS = (1, 2, 16)


def forward(case: Case, dropout_p: float, device: torch.device) -> tuple[list[Tensor | None], Tensor, Tensor, Tensor]:
    x, base, *adapter = case.inputs(device).tensors.values()
    seed = torch.tensor([5], device=device)
    arguments = [*adapter, *([None] * (4 - len(adapter))), seed, 0.5, dropout_p]
    y, u, kept = torch.ops.gralora_ext.gralora(x, base, *arguments)
    return [x, *arguments], torch.ones_like(y), u, kept


def backward(arguments: list, grad: Tensor, u: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.gralora_ext.gralora_backward(grad, arguments[0], u, kept, *arguments[1:], [True] * 5)


def case_of(dtypes: tuple[torch.dtype, ...], tokens: int, rank: int) -> Case:
    x, base, adapter = dtypes
    return Case((tokens,), 2, 48, 40, rb=rank, x_dtype=x, base_dtype=base, adapter_dtype=adapter)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: "-".join(NAMES[t] for t in d))
def test_backward_takes_an_empty_u_only_where_forward_keeps_none(
    dtypes: tuple[torch.dtype, ...], rank: int, device: torch.device
) -> None:
    for tokens, dropout_p in itertools.product((1, 5, 12, 32), (0.0, 0.5)):
        arguments, grad, u, kept = forward(case_of(dtypes, tokens, rank), dropout_p, device)
        x, _, adapter = dtypes
        keeps = x.itemsize > 2 or adapter.itemsize <= 2 or rank == 1
        assert len(u) == (tokens if keeps else 0)
        if set(dtypes) == {torch.bfloat16} and tokens > 4 and device.type == "cpu":
            assert u.dtype == torch.bfloat16
        if keeps:
            with pytest.raises(ValueError, match=rf"u must be .*\[{tokens}, {4 * rank}\], but has shape \[0, "):
                backward(arguments, grad, u[:0], kept)
        else:
            assert all(torch.isfinite(t).all() for t in backward(arguments, grad, u, kept))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_without_tokens_u_is_empty_and_gradients_are_zeros(dtype: torch.dtype, device: torch.device) -> None:
    arguments, grad, u, kept = forward(case_of((dtype,) * 3, 0, 16), 0.5, device)
    dx, dA, dB, *_ = backward(arguments, grad, u, kept)
    assert u.shape == (0, 64) and dx.shape == (0, 96)
    assert not dA.any() and not dB.any()


def test_linear_as_one_product_keeps_no_u() -> None:
    x, _, A, B = Case((5,), 2, 48, 40).inputs().tensors.values()
    weight, rest = torch.randn(80, 96), (A, B, None, None, None, 0.5, 0.0)
    y, u, kept = torch.ops.gralora_ext.linear(x, weight, None, *rest, True)
    gradients = torch.ops.gralora_ext.linear_backward(y, x, u, kept, weight, *rest, True, [True] * 5)
    _, kept_u, _ = torch.ops.gralora_ext.linear(x, weight, None, *rest, False)
    assert len(u) == 0 and len(kept_u) == 5
    with pytest.raises(ValueError, match=r"u must be .*\[5, 12\], but has shape \[0, "):
        torch.ops.gralora_ext.linear_backward(y, x, u, kept, weight, *rest, False, [True] * 5)
    expected = torch.ops.gralora_ext.linear_backward(y, x, kept_u, kept, weight, *rest, False, [True] * 5)
    for name, one, other in zip(("x", "A", "B"), gradients, expected, strict=False):
        assert_near(name, one, other, bound=tolerance(one, [torch.float32], gradient=True))


@pytest.mark.parametrize("rank", RANKS)
def test_fake_results_are_shaped_as_real_ones(rank: int, device: torch.device) -> None:
    for dtypes, width in itertools.product(MIXES, (48, 44)):
        x, base, A, B = case_of(dtypes, 6, rank).inputs(device).tensors.values()
        x, A = x[:, : 2 * width], A[:, :width]
        seed = torch.tensor([5], device=device)
        real = torch.ops.gralora_ext.gralora(x, base, A, B, None, None, seed, 0.5, 0.25)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in (x, base, A, B)]
            fake = torch.ops.gralora_ext.gralora(*fakes, None, None, mode.from_tensor(seed), 0.5, 0.25)
        for one, other in zip(real, fake, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype


def test_backward_twice_has_the_same_bits(device: torch.device) -> None:
    """Nothing is drawn or left behind between two backwards of one forward."""
    arguments, grad, u, kept = forward(case_of((torch.bfloat16,) * 3, 9, 16), 0.5, device)
    assert all(map(same_bits, backward(arguments, grad, u, kept), backward(arguments, grad, u, kept)))
