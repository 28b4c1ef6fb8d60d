# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of one call are transposes of each other: the path is linear in x, in A and in B.

With ``y`` the path alone (base and weight are zeros), ``<g, y> = <dx, x> = <dA, A> + <dAg, Ag> = <dB, B> + <dBg, Bg>``. No reference is
asked, so that a mask of dropout which backward reads otherwise than forward wrote it shows, whatever the mask is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import DTYPES, NAMES, Case, Inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gralora_ext import ops, reference

# Widths of a block whose mask is whole bytes, and whose halves, the chunks of sums in float64, once
# were not: 264, 280, ... of two chunks, 536, 560, ... of three.
WIDTHS = (8, 256, 264, 280, 296, 504, 520, 536, 560, 584, 808)
FLOAT64 = {  # (x, base, adapter): float64 alone, and beside others, which are then summed in it too
    "fp64": (torch.float64, torch.float64, torch.float64),
    "base": (torch.float32, torch.float64, torch.float32),
    "base_beside_fp16": (torch.float16, torch.float64, torch.float32),
    "x": (torch.float64, torch.bfloat16, torch.bfloat16),
    "adapter": (torch.bfloat16, torch.float32, torch.float64),
}


def path(x: Tensor, base: Tensor, A: Tensor, B: Tensor, **options: object) -> Tensor:
    return ops.gralora(x, torch.zeros_like(base), A, B, **options)


def path_into(x: Tensor, base: Tensor, A: Tensor, B: Tensor, **options: object) -> Tensor:
    return ops.gralora_(x, torch.zeros_like(base), A, B, **options)


def path_of_linear(own_gemm: bool) -> Callable[..., Tensor]:
    def call(x: Tensor, base: Tensor, A: Tensor, B: Tensor, **options: object) -> Tensor:
        weight = x.new_zeros(base.shape[-1], x.shape[-1])
        return ops.linear(x, weight, None, A, B, own_gemm=own_gemm, **options)

    return call


def terms(inputs: Inputs, dropout_p: float) -> float:
    """√(Σ terms²) of <g, y>, whose terms are products of one element of each factor, as large as dropout makes them."""
    squares = inputs.to(torch.float64).squared()
    x = squares.tensors.pop("x") / (1.0 - dropout_p) ** 2
    base = torch.zeros_like(squares.tensors.pop("base"))
    return float((squares.grad * reference.gralora(x, base, **squares.tensors, scaling=squares.scaling)).sum().sqrt())


def assert_identities(op: Callable[..., Tensor], inputs: Inputs, dropout_p: float) -> None:
    """An inner product is as exact as its result: each element is rounded once, by half a unit of its dtype, after a sum in float32 or
    float64. Sums run over at most 256 columns or 128 tokens at a time: their error grows as √256 of the accumulation type. Errors are
    independent, so that of an inner product is about that share of √(Σ terms²); eight times as much is allowed."""
    leaves = {name: t.detach().requires_grad_(name != "base") for name, t in inputs.tensors.items()}
    y = op(**leaves, scaling=inputs.scaling, dropout_p=dropout_p)
    assert y.grad_fn is not None
    wanted = [name for name in leaves if name != "base"]
    grads = dict(zip(wanted, torch.autograd.grad(y, [leaves[name] for name in wanted], inputs.grad), strict=True))

    products = {"y": inputs.grad.double() * y.detach().double()}
    products |= {name: grads[name].double() * leaves[name].detach().double() for name in wanted}
    dtypes = {"y": y.dtype, **{name: grads[name].dtype for name in wanted}}
    sums = torch.float64 if torch.float64 in (*dtypes.values(), inputs.tensors["base"].dtype) else torch.float32
    scale = max(terms(inputs, dropout_p), *(float(product.norm()) for product in products.values()))

    def value(name: str) -> tuple[float, float]:
        total = float(products[name].sum())
        if f"{name}_general" in products:
            total += float(products[f"{name}_general"].sum())
        return total, 8 * scale * (torch.finfo(dtypes[name]).eps / 2 + 16 * torch.finfo(sums).eps / 2)

    for one, other in itertools.combinations(("y", "x", "A", "B"), 2):
        (a, error_a), (b, error_b) = value(one), value(other)
        assert math.isclose(a, b, rel_tol=0, abs_tol=error_a + error_b), (
            f"<{one}> = {a:.9g}, but <{other}> = {b:.9g}: {abs(a - b) / (error_a + error_b):.1f} times what rounding allows"
        )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", FLOAT64.values(), ids=FLOAT64.keys())
def test_backward_reads_the_mask_that_forward_wrote(
    dtypes: tuple[torch.dtype, ...], width: int, device: torch.device
) -> None:
    x, base, adapter = dtypes
    for k, tokens, h, p in ((2, 7, 0, 1e-9), (1, 3, 2, 0.5), (3, 70, 0, 0.25)):
        case = Case((tokens,), k, width, 24, rb=2, h=h, x_dtype=x, base_dtype=base, adapter_dtype=adapter, seed=width)
        assert_identities(path, case.inputs(device), p)


def test_dropout_of_almost_nothing_zeroes_no_gradient(device: torch.device) -> None:
    inputs = Case((7,), k=2, n=264, m=24).uniform(torch.float64).inputs(device)
    x = inputs.tensors["x"].requires_grad_()
    y = path(**inputs.tensors, scaling=1.0, dropout_p=1e-9)
    (dx,) = torch.autograd.grad(y, x, inputs.grad)
    assert torch.count_nonzero(dx) == dx.numel()


@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, repeat=3)), ids=lambda d: "-".join(NAMES[t] for t in d)
)
def test_every_mix_of_dtypes(dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    x, base, adapter = dtypes
    for tokens, h, p in ((1, 1, 0.25), (9, 0, 0.25), (140, 2, 0.0)):
        case = Case((tokens,), 2, 264, 40, rb=4, h=h, x_dtype=x, base_dtype=base, adapter_dtype=adapter, seed=tokens)
        assert_identities(path, case.inputs(device), p)


CASES = st.builds(
    Case,
    leading=st.one_of(
        st.tuples(st.integers(1, 40)),
        st.tuples(st.sampled_from([1, 4, 5, 12, 31, 32, 127, 128, 129, 191, 192, 260])),
        st.tuples(st.integers(1, 4), st.integers(1, 40)),
    ),
    k=st.integers(1, 4),
    n=st.one_of(st.sampled_from(WIDTHS), st.integers(1, 320), st.integers(1, 80).map(lambda i: 8 * i)),
    m=st.one_of(st.integers(1, 70), st.sampled_from([264, 280, 536])),
    rb=st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 32])),
    h=st.one_of(st.just(0), st.integers(1, 9), st.just(32)),
    x_dtype=st.sampled_from(DTYPES),
    base_dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from(DTYPES),
    x_layout=st.sampled_from(
        ["contiguous", "contiguous", "offset", "row_slice", "padded", "column_stride", "transposed"]
    ),
    adapter_layout=st.sampled_from(["contiguous", "offset", "transposed"]),
    grad_layout=st.sampled_from(["contiguous", "row_slice", "transposed", "expanded_rows"]),
    scaling=st.sampled_from([1.0, 0.75, -2.0]),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=60 if settings().derandomize else 2000)
@given(
    case=CASES,
    all_bf16=st.sampled_from([False, False, False, True]),
    op=st.sampled_from(["path", "into", "linear", "own_gemm"]),
    dropout_p=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9]),
)
def test_any_call(case: Case, all_bf16: bool, op: str, dropout_p: float) -> None:
    if op == "own_gemm" and case.x_dtype not in (torch.float32, torch.float64):
        op = "linear"
    if op == "own_gemm" and case.adapter_dtype == torch.float64:
        case = replace(case, x_dtype=torch.float64)
    if op in ("linear", "own_gemm"):  # whose y is of x's dtype
        case = replace(case, base_dtype=case.x_dtype)
    if all_bf16 and op != "own_gemm":
        case = case.uniform(torch.bfloat16)
    calls = {"path": path, "into": path_into, "linear": path_of_linear(False), "own_gemm": path_of_linear(True)}
    torch.manual_seed(case.seed)
    assert_identities(calls[op], case.inputs(), dropout_p)
