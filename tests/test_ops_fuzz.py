# SPDX-License-Identifier: Apache-2.0
"""Random calls, most of them wrong in some way: each has the reference's numbers, or an error that leaves all memory as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from helpers import DTYPES, Case, Inputs, assert_near, expected_results, make, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gralora_ext import ops, reference
from gralora_ext.tolerances import tolerance

LAYOUTS = st.sampled_from(["contiguous", "offset", "row_slice", "column_stride", "transposed"])
DTYPE = st.sampled_from(DTYPES)
CASES = st.builds(
    Case,
    leading=st.one_of(st.just(()), st.tuples(st.integers(0, 9)), st.tuples(st.integers(1, 3), st.integers(1, 60))),
    k=st.integers(1, 4),
    n=st.one_of(st.integers(1, 40), st.sampled_from([8, 64, 264])),
    m=st.one_of(st.integers(1, 40), st.sampled_from([8, 64, 264])),
    rb=st.one_of(st.integers(1, 5), st.just(16)),
    h=st.one_of(st.just(0), st.integers(1, 5)),
    x_dtype=DTYPE,
    base_dtype=DTYPE,
    adapter_dtype=DTYPE,
    x_layout=LAYOUTS,
    base_layout=LAYOUTS,
    adapter_layout=LAYOUTS,
    grad_layout=LAYOUTS,
    scaling=st.sampled_from([1.0, 0.75, -2.0]),
    seed=st.integers(0, 2**31),
)


# ---------------------------------------------------------------- what can be wrong with a call


def resized(t: Tensor, draw: Callable) -> Tensor:
    d = draw(st.integers(0, max(t.dim() - 1, 0)))
    sizes = list(t.shape) or [1]
    sizes[d] = draw(st.sampled_from([0, 1, sizes[d] + 1, max(sizes[d] - 1, 0), 2 * sizes[d]]))
    return torch.randn(sizes).to(t.dtype)


def restrided(t: Tensor, draw: Callable) -> Tensor:
    """The same shape on other strides, which may overlap or not."""
    strides = [draw(st.integers(0, 2 * max(t.shape[-1], 1))) for _ in t.shape]
    last = sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True)) if t.numel() else 0
    return torch.randn(last + 1).to(t.dtype).as_strided(t.shape, strides)


MUTATIONS: dict[str, Callable[[Tensor, Callable], object]] = {
    "none": lambda t, draw: None,
    "other_type": lambda t, draw: draw(st.sampled_from([1, 0.5, "text", [1.0]])),
    "dtype": lambda t, draw: t.to(draw(st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.complex64]))),
    "sparse": lambda t, draw: t.contiguous().to_sparse() if t.dim() else t,
    "meta": lambda t, draw: t.to("meta"),
    "flat": lambda t, draw: t.reshape(-1),
    "one_more_dim": lambda t, draw: t[None],
    "first_of": lambda t, draw: t[0] if t.dim() and len(t) else t,
    "turned": lambda t, draw: t.transpose(0, -1) if t.dim() else t,
    "expanded": lambda t, draw: t[:1].expand(t.shape) if t.dim() and len(t) else t,
    "resized": resized,
    "restrided": restrided,
    "not_floating": lambda t, draw: t.to(draw(st.sampled_from([torch.int64, torch.bool, torch.complex64]))),
    "emptied": lambda t, draw: t[:0] if t.dim() else t,
    "copied": lambda t, draw: t.clone(),  # nothing is wrong
}
# What leaves no other values of a shape and dtype that may be right
PLAIN = ("none", "other_type", "sparse", "meta", "flat", "one_more_dim", "not_floating", "emptied", "copied")


def part_of(other: Tensor, t: Tensor, draw: Callable) -> tuple[Tensor, Tensor]:
    """``other``, and a tensor of t's shape in the same memory: the same, the second half, just behind it, or further."""
    memory = torch.zeros(other.numel() + t.numel() + 8, dtype=other.dtype)
    other_place = memory[: other.numel()].view(other.shape)
    other_place.copy_(other)
    start = draw(st.sampled_from([0, other.numel() // 2, other.numel(), other.numel() + 3]))
    return other_place, memory[start : start + t.numel()].view(t.shape)


def mutate(
    arguments: dict[str, object], draw: Callable, kinds: tuple[str, ...] = ("number", "shared", *MUTATIONS)
) -> None:
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    names = [name for name, t in tensors.items() if is_plain(t) and name != "seed"]
    kind = draw(st.sampled_from(kinds))
    if kind == "number":
        name = draw(st.sampled_from([name for name in ("scaling", "dropout_p") if name in arguments]))
        arguments[name] = draw(st.sampled_from([math.nan, math.inf, -0.5, 1.0, 1.5, 0.25]))
    elif names and kind == "shared":
        one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        if one != other and arguments[one].dtype == arguments[other].dtype:
            arguments[other], arguments[one] = part_of(arguments[other], arguments[one], draw)
    elif names:
        name = draw(st.sampled_from(names))
        arguments[name] = MUTATIONS[kind](arguments[name], draw)


def is_plain(t: Tensor) -> bool:
    return t.layout == torch.strided and t.device.type == "cpu"


# ---------------------------------------------------------------- what must hold


def memory(arguments: dict[str, object]) -> dict[str, Tensor]:
    """The storages of the arguments as bytes: what lies beside views too."""
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    return {n: torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for n, t in tensors.items() if is_plain(t)}


def call(op: Callable[..., object], arguments: dict[str, object], written: str | None = None) -> object:
    """What ``op`` gives, or None where it raises. No memory is changed but, where it raises not, the elements of ``written``."""
    before = {name: storage.clone() for name, storage in memory(arguments).items()}
    elements = arguments[written].clone() if isinstance(arguments.get(written), Tensor) else None
    torch.manual_seed(SEED)
    try:
        result = op(**arguments)
    except (ValueError, TypeError, RuntimeError):
        result = None
    except AttributeError:  # of the wrapper in Python, which asks x for its device
        assert "x" in arguments and not isinstance(arguments["x"], Tensor)
        result = None
    if result is not None and written is not None:
        assert result is arguments[written] or result.data_ptr() == arguments[written].data_ptr()
        result = result.clone()
        arguments[written].copy_(elements)
    for name, storage in memory(arguments).items():
        assert same_bits(storage, before[name]), f"the memory of {name} was changed"
    return result


def wide(arguments: dict[str, object]) -> dict[str, object]:
    return {name: t.to(torch.float64, copy=True) if isinstance(t, Tensor) else t for name, t in arguments.items()}


def assert_as_expected(op: str, specification: Callable[..., Tensor], written: str | None, case: dict, draw) -> None:
    """``ops.op`` raises, or has the numbers of the specification in float64."""
    for _ in range(draw(st.integers(0, 2))):
        mutate(case, draw)
    result = call(getattr(ops, op), case, written)
    if result is None or result.is_meta:
        return
    torch.manual_seed(SEED)
    expected = specification(**wide(case))
    squares = {name: t.square() if isinstance(t, Tensor) else t for name, t in wide(case).items()}
    torch.manual_seed(SEED)  # the same mask
    terms = specification(**{**squares, "scaling": case["scaling"] ** 2}).sum().sqrt()
    factor = (1.0 - case.get("dropout_p", 0.0)) ** -0.5  # of an element that is kept, whose square has it once alone
    size = torch.maximum(expected.norm(), factor * terms)
    dtypes = {t.dtype for t in case.values() if isinstance(t, Tensor)}
    assert_near(op, result, expected, size, tolerance(result, dtypes))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *, own_gemm: bool, **rest) -> Tensor:
    return reference.gralora(x, torch.nn.functional.linear(x, weight, bias), A, B, **rest)


SEED = 7
EXAMPLES = settings(max_examples=60 if settings().derandomize else 1000)
DROPOUT = st.sampled_from([0.0, 0.25])


@EXAMPLES
@given(CASES, DROPOUT, st.sampled_from(["gralora", "gralora_"]), st.data())
def test_path(case: Case, dropout_p: float, op: str, data: st.DataObject) -> None:
    arguments = {**case.inputs().tensors, "scaling": case.scaling, "dropout_p": dropout_p}
    assert_as_expected(op, reference.gralora, "base" if op == "gralora_" else None, arguments, data.draw)


@EXAMPLES
@given(CASES, DROPOUT, st.booleans(), st.booleans(), st.data())
def test_linear(case: Case, dropout_p: float, own_gemm: bool, with_bias: bool, data: st.DataObject) -> None:
    case = replace(case, base_dtype=case.x_dtype)
    tensors = case.inputs().tensors
    x, base = tensors["x"], tensors.pop("base")
    generator = torch.Generator().manual_seed(case.seed)
    weight = torch.randn(base.shape[-1], x.shape[-1], generator=generator).div(x.shape[-1] ** 0.5).to(x.dtype)
    bias = torch.randn(base.shape[-1], generator=generator).to(x.dtype) if with_bias else None
    rest = {"scaling": case.scaling, "dropout_p": dropout_p, "own_gemm": own_gemm}
    assert_as_expected("linear", linear, None, {"weight": weight, "bias": bias, **tensors, **rest}, data.draw)


@EXAMPLES
@given(CASES, st.sampled_from(["merge_", "delta_weight"]), st.booleans(), st.data())
def test_merge(case: Case, op: str, fan_in_fan_out: bool, data: st.DataObject) -> None:
    arguments = {**case.inputs().adapter(), "scaling": case.scaling, "fan_in_fan_out": fan_in_fan_out}
    specification = getattr(reference, op)
    if op == "delta_weight":
        return assert_as_expected(op, specification, None, arguments, data.draw)
    sizes = (case.k * case.n, case.k * case.m) if fan_in_fan_out else (case.k * case.m, case.k * case.n)
    generator = torch.Generator().manual_seed(case.seed)
    weight = make(sizes, case.base_layout, case.base_dtype, generator)
    return assert_as_expected(op, specification, "weight", {"weight": weight, **arguments}, data.draw)


def reference_path(**arguments: object) -> Tensor:
    torch.manual_seed(SEED)
    return reference.gralora(**arguments)


@EXAMPLES
@given(CASES, DROPOUT, st.data())
def test_backward(case: Case, dropout_p: float, data: st.DataObject) -> None:
    inputs = case.inputs()
    forward = {"A_general": None, "B_general": None, **inputs.tensors, "scaling": case.scaling, "dropout_p": dropout_p}
    torch.manual_seed(SEED)
    forward["seed"] = reference.draw_seed("cpu")
    for _ in range(data.draw(st.integers(0, 1))):
        mutate(forward, data.draw)
    kept_for_backward = call(torch.ops.gralora_ext.gralora, forward)
    if kept_for_backward is None or kept_for_backward[0].is_meta:
        return
    y, u, kept = kept_for_backward
    del forward["base"]
    arguments = {"grad": inputs.grad, "u": u, "kept": kept, **forward}
    for _ in range(data.draw(st.integers(0, 2))):
        mutate(arguments, data.draw, PLAIN)
    result = call(torch.ops.gralora_ext.gralora_backward, {**arguments, "needs": [True] * 5})
    if result is None or result[0].is_meta:
        return
    names = ("x", "A", "B", "A_general", "B_general")
    tensors = {name: arguments[name] for name in names if arguments[name] is not None}
    tensors["base"] = torch.zeros(*tensors["x"].shape[:-1], y.shape[-1])
    grad = arguments["grad"].reshape(tensors["base"].shape)
    now = Inputs(tensors, grad, arguments["scaling"])
    expected, sizes = expected_results(now, reference_path, dropout_p=arguments["dropout_p"])
    for name, gradient in zip(names, result, strict=True):
        if name in tensors:
            dtypes = {grad.dtype, *(arguments[n].dtype for n in names if arguments[n] is not None)}
            assert_near(name, gradient, expected[name], sizes[name], tolerance(gradient, dtypes, gradient=True))
