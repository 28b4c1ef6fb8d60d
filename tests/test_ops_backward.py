# SPDX-License-Identifier: Apache-2.0
"""``ops.gralora`` backward: against the reference and PEFT's layer, what is computed, saved and refused."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import (
    DTYPES,
    EXTREME_SIZES,
    LAYOUTS,
    NAMES,
    Case,
    Inputs,
    assert_near,
    assert_results_near,
    cases,
    value_and_gradients,
)
from hypothesis import given, settings
from peft import GraloraConfig, get_peft_model
from torch import Tensor, nn

from gralora_ext import ops, reference

ARGUMENTS = ("x", "A", "B", "A_general", "B_general")


def assert_gradients_near(inputs: Inputs) -> None:
    assert_results_near(value_and_gradients(ops.gralora, inputs), inputs)


@given(case=cases())
@settings(max_examples=400)
def test_gradients_equal_the_references_in_random_cases(case: Case, device: torch.device) -> None:
    assert_gradients_near(case.inputs(device))


@pytest.mark.parametrize("adapter", DTYPES, ids=lambda d: f"adapter_{NAMES[d]}")
@pytest.mark.parametrize("base", DTYPES, ids=lambda d: f"base_{NAMES[d]}")
@pytest.mark.parametrize("x", DTYPES, ids=lambda d: f"x_{NAMES[d]}")
def test_gradients_are_right_for_every_combination_of_dtypes(
    x: torch.dtype, base: torch.dtype, adapter: torch.dtype, device: torch.device
) -> None:
    case = Case(leading=(37,), k=4, n=33, m=41, rb=5, h=3, x_dtype=x, base_dtype=base, adapter_dtype=adapter)
    assert_gradients_near(case.inputs(device))


@pytest.mark.parametrize("leading", [(), (9,), (3, 5), (2, 3, 4)], ids=lambda s: f"{len(s) + 1}d")
@pytest.mark.parametrize("grad", LAYOUTS, ids=lambda s: f"grad_{s}")
@pytest.mark.parametrize("x", LAYOUTS, ids=lambda s: f"x_{s}")
def test_gradients_are_right_for_every_layout(
    x: str, grad: str, leading: tuple[int, ...], device: torch.device
) -> None:
    assert_gradients_near(Case(leading=leading, k=3, n=7, m=5, rb=2, h=2, x_layout=x, grad_layout=grad).inputs(device))


@pytest.mark.parametrize(("k", "n", "m", "rb", "h"), EXTREME_SIZES)
def test_gradients_are_right_at_extreme_sizes(k: int, n: int, m: int, rb: int, h: int, device: torch.device) -> None:
    assert_gradients_near(Case(leading=(65,), k=k, n=n, m=m, rb=rb, h=h).inputs(device))


# Blocks of two, one and no whole vectors of AVX-512; ranks of one group of rows and of several
@pytest.mark.parametrize(
    ("k", "n", "m", "rb", "h"),
    [(2, 64, 192, 8, 0), (2, 64, 48, 4, 0), (8, 16, 48, 2, 5), (3, 85, 41, 7, 0), (2, 70, 33, 4, 3)],
)
def test_gradients_are_right_where_rows_lie_in_few_sets_of_a_cache(
    k: int, n: int, m: int, rb: int, h: int, device: torch.device
) -> None:
    """On the CPU weight gradients copy the columns of such rows (multiples of 512 bytes apart) as they first read them."""
    inputs = Case(leading=(150,), k=k, n=n, m=m, rb=rb, h=h).inputs(device)
    x = torch.full((150, 256), torch.inf, device=device)  # what lies between the rows is not to be read into a sum
    x[:, : k * n] = inputs.tensors["x"]
    inputs.tensors["x"] = x[:, : k * n]
    grad = torch.full((150, 512), torch.inf, device=device)
    grad[:, : k * m] = inputs.grad
    assert_gradients_near(replace(inputs, grad=grad[:, : k * m]))


# Rows of ranks that are 4096 bytes apart, too, in float32 and in bfloat16; more ranks than a copy
# of them holds; several chunks of x, with one tile of ranks and with two, from which on rows of
# pairs are copied in backward, too
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize(
    ("k", "n", "m", "rb", "h"),
    [
        (2, 64, 48, 8, 0),
        (8, 12, 20, 16, 0),
        (8, 12, 20, 32, 0),
        (2, 10, 6, 256, 0),
        (2, 300, 290, 4, 2),
        (2, 500, 490, 20, 2),
    ],
)
def test_results_are_right_where_rows_lie_in_one_set_of_a_cache(
    k: int, n: int, m: int, rb: int, h: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows that are multiples of 4096 bytes apart, read where they lie."""
    inputs = Case(leading=(301,), k=k, n=n, m=m, rb=rb, h=h).uniform(dtype).inputs(device)

    def apart(rows: torch.Tensor) -> torch.Tensor:
        wide = torch.full((len(rows), 4096 // dtype.itemsize), torch.inf, dtype=dtype, device=device)
        wide[:, : rows.shape[1]] = rows  # what lies between the rows is not to be read into a sum
        return wide[:, : rows.shape[1]]

    inputs.tensors["x"] = apart(inputs.tensors["x"])
    assert_gradients_near(replace(inputs, grad=apart(inputs.grad)))


# One block of tokens (128, of pairs 256) and one more; ranks of more sizes than vectors have
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize(("k", "n", "m", "rb"), [(3, 70, 34, 11), (2, 300, 46, 24), (2, 26, 290, 32)])
@pytest.mark.parametrize("T", [7, 64, 128, 129, 255, 256, 257])
def test_gradients_are_right_around_the_ends_of_blocks_of_tokens(
    T: int, k: int, n: int, m: int, rb: int, dtype: torch.dtype, adapter: torch.dtype, device: torch.device
) -> None:
    case = Case(leading=(T,), k=k, n=n, m=m, rb=rb, x_dtype=dtype, base_dtype=dtype, adapter_dtype=adapter)
    assert_gradients_near(case.inputs(device))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("adapter", DTYPES, ids=lambda d: NAMES[d])
@pytest.mark.parametrize("rb", [5, 16])
@pytest.mark.parametrize("T", [1, 4, 5])
def test_gradients_of_a_few_tokens(
    T: int, rb: int, adapter: torch.dtype, dropout_p: float, device: torch.device
) -> None:
    """They are computed apart (csrc/cpu/backward_few.h): widths of several chunks, and of part of a vector."""
    for n, m in [(275, 300), (7, 13)]:
        inputs = Case(leading=(T,), k=3, n=n, m=m, rb=rb, adapter_dtype=adapter).inputs(device)
        torch.manual_seed(T)
        actual = value_and_gradients(ops.gralora, inputs, dropout_p=dropout_p)
        torch.manual_seed(T)
        assert_results_near(actual, inputs, dropout_p=dropout_p, seed=reference.draw_seed(device).cpu())


def test_no_tokens_give_zero_gradients_for_the_adapter(device: torch.device) -> None:
    inputs = Case(leading=(2, 0), h=2).inputs(device)
    results = value_and_gradients(ops.gralora, inputs)
    for name, t in inputs.tensors.items():
        assert torch.equal(results[name], torch.zeros_like(t))


def test_gradient_of_base_is_the_gradient_of_y_itself(device: torch.device) -> None:
    inputs = Case(base_dtype=torch.bfloat16).inputs(device)
    assert torch.equal(value_and_gradients(ops.gralora, inputs)["base"], inputs.grad)


@pytest.mark.parametrize("frozen_base", [False, True], ids=["", "frozen_base"])
@pytest.mark.parametrize(("T", "h"), [(21, 3), (3, 0)])
@pytest.mark.parametrize("wanted", list(product([False, True], repeat=5)), ids=lambda w: "".join("01"[q] for q in w))
def test_only_the_gradients_that_are_wanted_come_and_they_are_right(
    wanted: tuple[bool, ...], T: int, h: int, frozen_base: bool, device: torch.device
) -> None:
    inputs = Case(leading=(T,), k=2, n=9, m=10, h=h).inputs(device)
    complete = value_and_gradients(ops.gralora, inputs)
    leaves = {name: t.detach().clone() for name, t in inputs.tensors.items()}
    for name, want in {**dict(zip(ARGUMENTS, wanted, strict=True)), "base": not frozen_base}.items():
        if name in leaves:
            leaves[name].requires_grad_(want)
    y = ops.gralora(**leaves, scaling=inputs.scaling)
    assert y.requires_grad == any(leaf.requires_grad for leaf in leaves.values())
    if y.requires_grad:
        y.backward(inputs.grad)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, complete[name])


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=5)), ids=lambda w: "".join("01"[q] for q in w))
def test_backward_op_allocates_nothing_that_is_not_needed(wanted: tuple[bool, ...], device: torch.device) -> None:
    inputs = Case(h=3).inputs(device)
    x, base, *adapter = inputs.tensors.values()
    _, *left = torch.ops.gralora_ext.gralora(x, base, *adapter, None, 0.75, 0.0)
    gradients = torch.ops.gralora_ext.gralora_backward(inputs.grad, x, *left, *adapter, None, 0.75, 0.0, list(wanted))
    for gradient, t, want in zip(gradients, (x, *adapter), wanted, strict=True):
        assert gradient.shape == (t.shape if want else (0,))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4], ids=["", "dropout"])
@pytest.mark.parametrize("h", [0, 2], ids=["", "hybrid"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_gradcheck_passes(k: int, h: int, dropout_p: float, device: torch.device) -> None:
    inputs = Case(leading=(2, 3), k=k, n=2, m=3, rb=2, h=h).uniform(torch.float64).inputs(device)
    names = list(inputs.tensors)
    seed = torch.tensor([4321], device=device) if dropout_p else None

    def call(*tensors: Tensor) -> Tensor:
        t = dict(zip(names, tensors, strict=True))
        general = t.get("A_general"), t.get("B_general")
        return torch.ops.gralora_ext.gralora(t["x"], t["base"], t["A"], t["B"], *general, seed, 0.75, dropout_p)[0]

    torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs.tensors.values()])


@pytest.mark.parametrize(("k", "h"), [(1, 0), (2, 0), (4, 3)])
def test_gradients_equal_those_of_pefts_layer(k: int, h: int, device: torch.device) -> None:
    torch.manual_seed(k)
    config = GraloraConfig(r=8, hybrid_r=h, gralora_k=k, alpha=24, target_modules=["0"], init_weights=False)
    layer = get_peft_model(nn.Sequential(nn.Linear(24, 40)), config).to(device).base_model.model[0]
    x = torch.randn(2, 13, 24, device=device, requires_grad=True)
    grad = torch.randn(2, 13, 40, device=device)
    adapter = {"A": layer.gralora_A["default"], "B": layer.gralora_B["default"]}
    if h:
        adapter["A_general"] = layer.gralora_A_general["default"].weight
        adapter["B_general"] = layer.gralora_B_general["default"].weight
    wrt = [x, *adapter.values()]
    theirs = torch.autograd.grad(layer(x), wrt, grad)
    y = ops.gralora(x, layer.base_layer(x), **adapter, scaling=layer.scaling["default"])
    for name, ours, their in zip(["x", *adapter], torch.autograd.grad(y, wrt, grad), theirs, strict=True):
        assert_near(name, ours, their, bound=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["", "dropout"])
@pytest.mark.parametrize("h", [0, 3], ids=["", "hybrid"])
@pytest.mark.parametrize("x_layout", ["contiguous", "column_stride", "leading_permuted"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_saved_for_backward_are_x_itself_the_adapter_u_and_the_seed(
    x_dtype: torch.dtype, x_layout: str, h: int, dropout_p: float, device: torch.device
) -> None:
    case = Case(leading=(6, 50), h=h, x_dtype=x_dtype, base_dtype=x_dtype, x_layout=x_layout)
    leaves = {name: t.requires_grad_() for name, t in case.inputs(device).tensors.items()}
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.gralora(**leaves, scaling=0.5, dropout_p=dropout_p)
    y.sum().backward()
    callers = {t.untyped_storage().data_ptr() for name, t in leaves.items() if name != "base"}
    added = [t for t in saved if t.untyped_storage().data_ptr() not in callers]
    assert callers <= {t.untyped_storage().data_ptr() for t in saved}
    T, r = 300, case.k * case.rb
    u_bytes = T * (case.k * r + h) * 4
    assert sum(t.untyped_storage().nbytes() for t in added) <= u_bytes + 8 * bool(dropout_p)


def test_frozen_call_keeps_nothing_alive(device: torch.device) -> None:
    inputs = Case().inputs(device)
    x = inputs.tensors["x"]
    y = ops.gralora(**inputs.tensors, scaling=0.5)
    gone = weakref.ref(x)
    del x, inputs
    assert gone() is None
    assert y.grad_fn is None


def test_what_is_left_for_backward_is_no_part_of_the_graph(device: torch.device) -> None:
    x, base, A, B = (t.requires_grad_() for t in Case().inputs(device).tensors.values())
    y, u, kept = torch.ops.gralora_ext.gralora(x, base, A, B, None, None, None, 1.0, 0.0)
    assert y.requires_grad
    assert not (u.requires_grad or kept.requires_grad)


@pytest.mark.parametrize("name", ["x", "A", "B", "A_general", "B_general"])
def test_backward_refuses_an_argument_changed_since_forward(name: str, device: torch.device) -> None:
    inputs = Case(h=2).inputs(device)
    leaves = {n: t.requires_grad_() for n, t in inputs.tensors.items()}
    y = ops.gralora(**leaves, scaling=0.5)
    with torch.no_grad():
        leaves[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.grad)


def test_base_may_change_after_forward(device: torch.device) -> None:
    inputs = Case().inputs(device)
    expected = value_and_gradients(ops.gralora, inputs)
    leaves = {n: t.requires_grad_() for n, t in inputs.tensors.items()}
    base = leaves["base"] * 1  # not a leaf, so that it may be written to
    y = ops.gralora(**{**leaves, "base": base}, scaling=inputs.scaling)
    with torch.no_grad():
        base.zero_()
    y.backward(inputs.grad)
    assert torch.equal(leaves["A"].grad, expected["A"])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_second_derivative_is_refused_and_the_first_is_right_beside_it(name: str, device: torch.device) -> None:
    """As in a gradient penalty: y's own loss is linear, so only the saved tensors carry the second derivative."""
    inputs = Case(h=2).inputs(device)
    plain = value_and_gradients(ops.gralora, inputs)[name]
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.tensors.items()}
    y = ops.gralora(**leaves, scaling=inputs.scaling)
    (first,) = torch.autograd.grad(y, leaves[name], inputs.grad, create_graph=True)
    assert torch.equal(first, plain)
    with pytest.raises((RuntimeError, NotImplementedError), match="gralora|twice|double|not implemented"):
        (first.square().sum() + y.sum()).backward()


def test_backward_runs_twice_on_a_retained_graph(device: torch.device) -> None:
    inputs = Case(h=2).inputs(device)
    leaves = {n: t.requires_grad_() for n, t in inputs.tensors.items()}
    y = ops.gralora(**leaves, scaling=0.5, dropout_p=0.3)
    wrt = list(leaves.values())
    first = torch.autograd.grad(y, wrt, inputs.grad, retain_graph=True)
    second = torch.autograd.grad(y, wrt, inputs.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shared_tensors_add_their_gradients(device: torch.device) -> None:
    """x given as base too, as in a residual block of a square layer."""
    inputs = Case(n=10, m=10).uniform(torch.float64).inputs(device)
    x, _, A, B = (t.requires_grad_() for t in inputs.tensors.values())
    apart = value_and_gradients(ops.gralora, inputs)
    (together,) = torch.autograd.grad(ops.gralora(x, x, A, B, scaling=inputs.scaling), x, inputs.grad)
    assert_near("x", together, apart["x"] + apart["base"])
