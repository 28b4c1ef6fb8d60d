# SPDX-License-Identifier: Apache-2.0
"""Dropout inside the op: the reference's mask to the bit, one mask in forward, backward and both parts, statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import DTYPES, LAYOUTS, NAMES, Case, assert_results_near, cases, make, same_bits, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gralora_ext import ops, reference

SEEDS = [0, 1, -1, 2**31, 2**32 + 7, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]
# Widths of whole bytes, whose mask forward keeps for backward on the CPU, and others
SHAPES = [(5,), (70, 6), (3, 7, 9), (2, 3, 2, 35), (65, 132), (8,), (3, 9, 40), (67, 576), (30, 1037)]


def gralora_with(seed: Tensor, dropout_p: float) -> Callable[..., Tensor]:
    """``ops.gralora`` with a seed that is given where it would be drawn."""

    def call(x, base, A, B, *, scaling, A_general=None, B_general=None) -> Tensor:
        return torch.ops.gralora_ext.gralora(x, base, A, B, A_general, B_general, seed, scaling, dropout_p)[0]

    return call


def identity_adapter(N: int, k: int, hybrid: bool, device: torch.device) -> dict[str, Tensor]:
    """An adapter with ΔW = I, in the block part or, where ``hybrid``, in the plain LoRA beside blocks of zeros."""
    width = N // k
    A, B = torch.zeros(k, width, N, device=device), torch.zeros(k, N, width, device=device)
    if hybrid:
        unit = torch.eye(N, device=device)
        return {"A": A, "B": B, "A_general": unit, "B_general": unit}
    for j in range(k):  # block j takes the N/k ranks of its own input block and nothing of the others
        A[j, :, j * width : (j + 1) * width] = torch.eye(width)
        B[j, j * width : (j + 1) * width, :] = torch.eye(width)
    return {"A": A, "B": B}


def masks(x: Tensor, seed: Tensor, dropout_p: float, k: int = 1, hybrid: bool = False) -> tuple[Tensor, Tensor]:
    """The keep masks that forward and backward apply to ``x`` (without zeros), seen through an adapter with ΔW = I."""
    x = x.detach().requires_grad_()
    base = torch.zeros(x.shape, device=x.device)
    adapter = identity_adapter(x.shape[-1], k, hybrid, x.device)
    y = gralora_with(seed, dropout_p)(x, base, **adapter, scaling=1.0)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y != 0, dx != 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_masks_are_the_references_to_the_bit(shape: tuple[int, ...], seed: int, device: torch.device) -> None:
    given_seed = torch.tensor([seed], device=device)
    for dropout_p in (0.1, 0.5, 0.9):
        expected = reference.dropout_mask(given_seed, shape, dropout_p)
        for mask in masks(torch.ones(shape, device=device), given_seed, dropout_p):
            assert torch.equal(mask, expected)


@pytest.mark.parametrize("N", [30, 240])
@pytest.mark.parametrize("hybrid", [False, True], ids=["blocks", "hybrid"])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_every_block_and_the_hybrid_part_share_one_mask(k: int, hybrid: bool, N: int, device: torch.device) -> None:
    seed = torch.tensor([99], device=device)
    expected = reference.dropout_mask(seed, (67, N), 0.3)
    for mask in masks(torch.ones(67, N, device=device), seed, 0.3, k, hybrid):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("T", [1, 3, 40, 1100])
@pytest.mark.parametrize(("k", "n", "rb"), [(1, 8, 2), (2, 288, 8), (3, 24, 1), (4, 536, 3), (2, 60, 4), (1, 33, 2)])
def test_the_mask_that_forward_leaves_is_the_one_that_backward_draws_without_it(
    k: int, n: int, rb: int, T: int, dtype: torch.dtype, device: torch.device
) -> None:
    """As bits, where a block is whole bytes wide, on the CPU; U is kept beside float32 and made again beside bfloat16."""
    native, seed, N = torch.ops.gralora_ext, torch.tensor([77], device=device), k * n
    inputs = Case((T,), k, n, 16, rb, x_dtype=dtype, base_dtype=dtype).inputs(device)
    x, base, A, B = inputs.tensors.values()
    adapter = (A, B, None, None, seed, 0.75, 0.3)
    _, u, kept = native.gralora(x, base, *adapter)
    keeps = device.type == "cpu" and n % 8 == 0
    assert kept.dtype == torch.uint8 and kept.shape == (T if keeps else 0, N // 8)
    if keeps:
        bits = kept[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
        assert torch.equal(bits.view(T, N).bool(), reference.dropout_mask(seed, (T, N), 0.3))
    with_it, without = (
        native.gralora_backward(inputs.grad, x, u, mask, *adapter, [True] * 3 + [False] * 2)
        for mask in (kept, kept[:0])
    )
    assert all(same_bits(a, b) for a, b in zip(with_it, without, strict=True))
    if keeps:  # and it is read
        dx = native.gralora_backward(inputs.grad, x, u, torch.zeros_like(kept), *adapter, [True] + [False] * 4)[0]
        assert not dx.any() and with_it[0].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_mask_follows_the_elements_and_not_the_memory(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    x = make((5, 4, 21), layout, dtype, torch.Generator().manual_seed(8)).to(device)
    assert x.all()
    seed = torch.tensor([-3], device=device)
    for mask in masks(x, seed, 0.4, k=3):
        assert torch.equal(mask, reference.dropout_mask(seed, x.shape, 0.4))


@pytest.mark.parametrize("dropout_p", [1e-12, 2**-32, 0.9999, 1 - 2**-32, 1 - 2**-53])
def test_mask_is_the_references_for_extreme_probabilities(dropout_p: float, device: torch.device) -> None:
    seed, x = torch.tensor([12], device=device), torch.ones(300, 50, device=device)
    masks(x, seed, 0.1)  # leaves bits in the scratch that the calls below take
    for mask in masks(x, seed, dropout_p):
        assert torch.equal(mask, reference.dropout_mask(seed, (300, 50), dropout_p))


@given(case=cases(), seed=st.integers(-(2**63), 2**63 - 1), dropout_p=st.sampled_from([0.05, 0.1, 0.5, 0.8]))
@settings(max_examples=200)
def test_results_equal_the_references_under_the_same_seed(
    case: Case, seed: int, dropout_p: float, device: torch.device
) -> None:
    inputs = case.inputs(device)
    results = value_and_gradients(gralora_with(torch.tensor([seed], device=device), dropout_p), inputs)
    assert_results_near(results, inputs, dropout_p=dropout_p, seed=torch.tensor([seed]))


def test_manual_seed_draws_the_references_mask(device: torch.device) -> None:
    inputs = Case(leading=(3, 17), k=4, n=11, m=6, h=2).inputs(device)
    torch.manual_seed(31)
    results = value_and_gradients(ops.gralora, inputs, dropout_p=0.3)
    torch.manual_seed(31)
    assert_results_near(results, inputs, dropout_p=0.3, seed=reference.draw_seed(device).cpu())


def test_manual_seed_repeats_a_sequence_of_different_masks(device: torch.device) -> None:
    inputs = Case(leading=(40,), h=2).inputs(device)

    def sequence() -> list[Tensor]:
        torch.manual_seed(5)
        return [ops.gralora(**inputs.tensors, scaling=1.0, dropout_p=0.5) for _ in range(3)]

    first, again = sequence(), sequence()
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


@pytest.mark.parametrize("options", [{"dropout_p": 0.0}, {"dropout_p": 0.5, "training": False}], ids=["p=0", "eval"])
def test_no_dropout_is_the_plain_op_and_leaves_the_generator_alone(options: dict, device: torch.device) -> None:
    inputs = Case(leading=(40,), h=2).inputs(device)
    torch.manual_seed(5)
    drawn_before = torch.rand(1)
    torch.manual_seed(5)
    results = value_and_gradients(ops.gralora, inputs, **options)
    assert torch.equal(torch.rand(1), drawn_before)
    plain = value_and_gradients(ops.gralora, inputs)
    assert all(same_bits(results[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.75])
def test_share_of_kept_elements_is_that_of_independent_draws(dropout_p: float, device: torch.device) -> None:
    """The mean, and the covariances within a Philox call, with the next call, row and seed: 5 sigma."""
    T, N = 2000, 103
    seeds = [torch.tensor([seed], device=device) for seed in (1, 2)]
    kept, other = (masks(torch.ones(T, N, device=device), seed, dropout_p)[0].double() for seed in seeds)
    variance = dropout_p * (1 - dropout_p)
    assert abs(kept.mean() - (1 - dropout_p)) < 5 * (variance / (T * N)) ** 0.5
    centred, centred_other = kept - (1 - dropout_p), other - (1 - dropout_p)
    row = centred.flatten()
    apart = [(row[n:], row[:-n]) for n in (*range(1, 17), N)]
    for a, b in [*apart, (row, centred_other.flatten())]:
        assert abs((a * b).mean()) < 5 * variance / len(a) ** 0.5


def test_any_two_draws_of_a_counter_are_independent() -> None:
    """Their 32 bits are linearly independent sums of the counter's 128, by which all values are equally likely."""

    def draws(b: list[Tensor]) -> Tensor:
        """Draws of 16 bits each, high byte first, from the bytes of a counter, as vectors over GF(2)."""
        low = [b[i ^ 8] ^ b[i & 8 | (i + 1) & 7] for i in range(16)]
        return torch.stack([torch.cat((high, extra)) for high, extra in zip(b, low, strict=True)])

    def rank(rows: Tensor) -> int:
        pivots: dict[int, int] = {}
        for bits in (int("".join(map(str, row.tolist())), 2) for row in rows):
            while bits and bits.bit_length() in pivots:
                bits ^= pivots[bits.bit_length()]
            if bits:
                pivots[bits.bit_length()] = bits
        return len(pivots)

    unit = torch.eye(128, dtype=torch.int64).unflatten(0, (16, 8))
    of_bits = draws(list(unit))
    for i, j in itertools.combinations(range(16), 2):
        assert rank(torch.cat((of_bits[i], of_bits[j]))) == 32

    words = reference.philox_4x32_10(5, torch.arange(40))
    b = torch.stack([words >> bits & 0xFF for bits in (0, 8, 16, 24)], dim=-1).flatten(1)
    high, low = draws(list(b.T)).view(16, 2, 40).unbind(1)
    assert torch.equal((high << 8 | low).T.flatten(), reference.dropout_draws(5, torch.arange(40)))


def test_kept_elements_are_scaled_so_that_the_mean_stays(device: torch.device) -> None:
    x = torch.full((500, 64), 3.0, device=device)
    adapter = identity_adapter(64, 1, False, device)
    y = gralora_with(torch.tensor([4], device=device), 0.25)(x, torch.zeros_like(x), **adapter, scaling=1.0)
    assert torch.allclose(y[y != 0], torch.tensor(4.0))
    assert abs(y.mean() - 3.0) < 5 * 4 * (0.25 * 0.75 / y.numel()) ** 0.5


def test_dropped_infinities_leave_no_trace(device: torch.device) -> None:
    """An element that is dropped is 0 and not 0·x, in y and in the adapter's gradients."""
    inputs = Case(leading=(40,), h=2).inputs(device)
    seed = torch.tensor([21], device=device)
    clean = value_and_gradients(gralora_with(seed, 0.5), inputs)
    dropped = ~reference.dropout_mask(seed, inputs.tensors["x"].shape, 0.5)
    inputs.tensors["x"][dropped] = torch.inf
    results = value_and_gradients(gralora_with(seed, 0.5), inputs)
    assert all(same_bits(results[name], clean[name]) for name in clean)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing_remakes_the_same_mask(use_reentrant: bool, device: torch.device) -> None:
    inputs = Case(leading=(40,), h=2).inputs(device)

    def checkpointed(*, scaling: float, **tensors: Tensor) -> Tensor:
        def call(*values: Tensor) -> Tensor:
            return ops.gralora(**dict(zip(tensors, values, strict=True)), scaling=scaling, dropout_p=0.5)

        return checkpoint(call, *tensors.values(), use_reentrant=use_reentrant)

    torch.manual_seed(2)
    plain = value_and_gradients(ops.gralora, inputs, dropout_p=0.5)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    torch.manual_seed(2)
    y = checkpointed(**leaves, scaling=inputs.scaling)
    torch.manual_seed(77)  # whatever is drawn in between, recomputation restores the state of its forward
    y.backward(inputs.grad)
    assert same_bits(y.detach(), plain["y"])
    assert all(same_bits(leaf.grad, plain[name]) for name, leaf in leaves.items())
