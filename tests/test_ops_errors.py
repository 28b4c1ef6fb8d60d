# SPDX-License-Identifier: Apache-2.0
"""Every wrong argument raises the right type, and the message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from helpers import Case, same_bits
from torch import Tensor, nn
from torch.autograd import forward_ad

from gralora_ext import ops
from gralora_ext._loader import load

# k = 2, N = 8, M = 10, r = 6, h = 3, T = 7
GOOD = Case(n=4, m=5, rb=3, h=3)


def like(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# name → (what is changed in a good call, error, what the message holds). Of the adapter, for all
# three ops:
ADAPTER_ERRORS = {
    "A_2d": ({"A": like(8, 6)}, ValueError, ["A", "k, N/k, r", "8, 6"]),
    "B_2d": ({"B": like(6, 10)}, ValueError, ["B", "k, r, M/k", "6, 10"]),
    "A_none": ({"A": None}, TypeError, ["A", "tensor", "None"]),
    "B_none": ({"B": None}, TypeError, ["B", "tensor", "None"]),
    "A_empty": ({"A": like(2, 4, 0)}, ValueError, ["A", "2, 4, 0"]),
    "rank_not_divisible_by_k": ({"A": like(2, 4, 5), "B": like(2, 5, 5)}, ValueError, ["rank", "divisible", "5", "2"]),
    "B_of_another_k": ({"B": like(5, 6, 2)}, ValueError, ["B", "2, 6", "5, 6, 2"]),
    "B_of_another_rank": ({"B": like(2, 4, 5)}, ValueError, ["B", "2, 6", "2, 4, 5"]),
    "A_int": ({"A": like(2, 4, 6, dtype=torch.int32)}, TypeError, ["A", "float32", "(?i)int"]),
    "A_complex": ({"A": like(2, 4, 6, dtype=torch.complex64)}, TypeError, ["A", "float32", "(?i)complex"]),
    "B_int": ({"B": like(2, 6, 5, dtype=torch.int64)}, TypeError, ["B", "float32", "(?i)long|int64"]),
    "B_of_another_dtype": (
        {"B": like(2, 6, 5, dtype=torch.float64)},
        TypeError,
        ["B", "A", "(?i)float", "(?i)double|64"],
    ),
    "A_general_alone": ({"B_general": None}, ValueError, ["A_general", "B_general", "None"]),
    "B_general_alone": ({"A_general": None}, ValueError, ["A_general", "B_general", "None"]),
    "A_general_1d": ({"A_general": like(8)}, ValueError, ["A_general", "h, N", "[8]"]),
    "A_general_of_another_N": ({"A_general": like(3, 9)}, ValueError, ["A_general", "8", "3, 9"]),
    "A_general_transposed": ({"A_general": like(8, 3)}, ValueError, ["A_general", "h, 8", "8, 3"]),
    "B_general_of_another_M": ({"B_general": like(11, 3)}, ValueError, ["B_general", "10, 3", "11, 3"]),
    "B_general_of_another_h": ({"B_general": like(10, 2)}, ValueError, ["B_general", "10, 3", "10, 2"]),
    "general_of_another_dtype": (
        {"A_general": like(3, 8, dtype=torch.float16)},
        TypeError,
        ["A_general", "(?i)float", "(?i)half|16"],
    ),
    "B_on_another_device": ({"B": like(2, 6, 5, device="meta")}, ValueError, ["B", "cpu", "meta"]),
    "A_general_on_another_device": (
        {"A_general": like(3, 8, device="meta")},
        ValueError,
        ["A_general", "cpu", "meta"],
    ),
    "scaling_nan": ({"scaling": math.nan}, ValueError, ["scaling", "finite", "nan"]),
    "scaling_infinite": ({"scaling": math.inf}, ValueError, ["scaling", "finite", "inf"]),
}
GRALORA_ERRORS = {
    "x_of_another_width": ({"x": like(7, 9)}, ValueError, ["x", "8", "7, 9"]),
    "x_none": ({"x": None}, TypeError, ["x", "tensor", "None"]),
    "base_none": ({"base": None}, TypeError, ["base", "tensor", "None"]),
    "x_0d": ({"x": like()}, ValueError, ["x", r"\.\.\., N", "[]"]),
    "base_of_another_width": ({"base": like(7, 8)}, ValueError, ["base", "10", "7, 8"]),
    "base_of_other_tokens": ({"base": like(6, 10)}, ValueError, ["base", "7, 8", "6, 10"]),
    "base_of_another_rank": ({"base": like(1, 7, 10)}, ValueError, ["base", "7, 8", "1, 7, 10"]),
    "base_0d": ({"base": like()}, ValueError, ["base", r"\.\.\., M", "[]"]),
    "x_int": ({"x": like(7, 8, dtype=torch.int64)}, TypeError, ["x", "float32", "(?i)long|int64"]),
    "base_bool": ({"base": like(7, 10, dtype=torch.bool)}, TypeError, ["base", "float32", "(?i)bool"]),
    "x_on_another_device": ({"x": like(7, 8, device="meta")}, ValueError, ["x", "cpu", "meta"]),
    "base_on_another_device": ({"base": like(7, 10, device="meta")}, ValueError, ["base", "cpu", "meta"]),
    "A_on_another_device": ({"A": like(2, 4, 6, device="meta")}, ValueError, ["cpu", "meta"]),
    "dropout_p_negative": ({"dropout_p": -0.25}, ValueError, ["dropout_p", r"\[0, 1\)", "-0.25"]),
    "dropout_p_one": ({"dropout_p": 1.0}, ValueError, ["dropout_p", r"\[0, 1\)", "1"]),
    "dropout_p_above_one": ({"dropout_p": 1.5}, ValueError, ["dropout_p", r"\[0, 1\)", "1.5"]),
    "dropout_p_nan": ({"dropout_p": math.nan}, ValueError, ["dropout_p", r"\[0, 1\)", "nan"]),
}
MERGE_ERRORS = {
    "weight_transposed": ({"weight": like(8, 10)}, ValueError, ["weight", "10, 8", "8, 10"]),
    "weight_not_transposed": ({"fan_in_fan_out": True}, ValueError, ["weight", "8, 10", "10, 8"]),
    "weight_3d": ({"weight": like(1, 10, 8)}, ValueError, ["weight", "10, 8", "1, 10, 8"]),
    "weight_int": ({"weight": like(10, 8, dtype=torch.int8)}, TypeError, ["weight", "float32", "(?i)char|int8"]),
    "weight_on_another_device": ({"weight": like(10, 8, device="meta")}, ValueError, ["weight", "cpu", "meta"]),
}


@pytest.fixture(params=["kernels", "plain torch"])
def how(request: pytest.FixtureRequest) -> Iterator[None]:
    """In forward mode plain torch operations take the kernels' places, and refuse the same."""
    with forward_ad.dual_level() if request.param == "plain torch" else nullcontext():
        yield


def each(errors: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("change", "error", "parts"), errors.values(), ids=errors.keys())


def assert_refused(call: Callable[..., object], arguments: dict, error: type[Exception], parts: list[str]) -> None:
    kept = {name: t.clone() for name, t in arguments.items() if isinstance(t, Tensor) and t.device.type == "cpu"}
    with pytest.raises(error) as raised:
        call(**arguments)
    message = str(raised.value)
    for part in parts:
        pattern = part if re.search(r"[\\|(]", part) else re.escape(part)
        pattern = rf"\b{pattern}\b" if part.isidentifier() else pattern
        assert re.search(pattern, message), f"{part!r} is not in {message!r}"
    assert all(same_bits(arguments[name], t) for name, t in kept.items())


@pytest.mark.usefixtures("how")
@each({**ADAPTER_ERRORS, **GRALORA_ERRORS})
def test_gralora_refuses(change: dict, error: type[Exception], parts: list[str]) -> None:
    arguments = {**GOOD.inputs().tensors, "scaling": 0.5, **change}
    assert_refused(ops.gralora, arguments, error, parts)


@each({**ADAPTER_ERRORS, **GRALORA_ERRORS})
def test_gralora_refuses_where_gradients_are_recorded(change: dict, error: type[Exception], parts: list[str]) -> None:
    tensors = {name: t.requires_grad_() for name, t in GOOD.inputs().tensors.items()}
    assert_refused(ops.gralora, {**tensors, "scaling": 0.5, **change}, error, parts)


@pytest.mark.usefixtures("how")
@each({**ADAPTER_ERRORS, **MERGE_ERRORS})
def test_merge_refuses_and_leaves_the_weight_as_it_was(change: dict, error: type[Exception], parts: list[str]) -> None:
    arguments = {"weight": torch.ones(10, 8), **GOOD.inputs().adapter(), "scaling": 0.5, **change}
    version = arguments["weight"]._version
    assert_refused(ops.merge_, arguments, error, parts)
    assert arguments["weight"]._version == version


def test_merge_refuses_a_weight_that_is_none() -> None:
    assert_refused(
        ops.merge_, {"weight": None, **GOOD.inputs().adapter(), "scaling": 0.5}, TypeError, ["weight", "None"]
    )


@pytest.mark.usefixtures("how")
@each(ADAPTER_ERRORS)
def test_delta_weight_refuses(change: dict, error: type[Exception], parts: list[str]) -> None:
    assert_refused(ops.delta_weight, {**GOOD.inputs().adapter(), "scaling": 0.5, **change}, error, parts)


@pytest.mark.parametrize(
    ("seed", "error", "parts"),
    [
        (None, ValueError, ["seed", "None"]),
        (torch.zeros(2, dtype=torch.int64), ValueError, ["seed", "one element", "[2]"]),
        (torch.zeros(1), TypeError, ["seed", "int64", "(?i)float"]),
        (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, ["seed", "cpu", "meta"]),
    ],
    ids=["none", "two", "float", "meta"],
)
def test_raw_op_refuses_a_wrong_seed(seed: Tensor | None, error: type[Exception], parts: list[str]) -> None:
    x, base, *adapter = GOOD.inputs().tensors.values()

    def call(seed: Tensor | None) -> object:
        return torch.ops.gralora_ext.gralora(x, base, *adapter, seed, 0.5, 0.25)

    assert_refused(call, {"seed": seed}, error, parts)


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"grad": like(7, 9)}, ValueError, ["grad", "10", "7, 9"]),
        ({"grad": like(6, 10)}, ValueError, ["grad", "7, 8", "6, 10"]),
        ({"grad": like(1, 7, 10)}, ValueError, ["grad", "7, 8", "1, 7, 10"]),  # as many tokens, in another shape
        ({"u": like(7, 12)}, ValueError, ["u", "7, 15", "7, 12"]),
        ({"u": like(7, 15, dtype=torch.float16)}, TypeError, ["u", "(?i)float", "(?i)half|16"]),
        ({"u": like(7, 15, dtype=torch.bfloat16)}, TypeError, ["u", "float32 or float64", "(?i)bfloat16"]),
        ({"kept": like(7, 2, dtype=torch.uint8)}, ValueError, ["kept", "0, 1", "7, 2"]),
        (
            {"kept": like(7, 1, dtype=torch.uint8)},
            ValueError,
            ["kept", "0, 1", "7, 1"],
        ),  # a block's width is no whole bytes
        ({"kept": like(0, 1)}, TypeError, ["kept", "uint8", "(?i)float"]),
        ({"x": like(7, 9)}, ValueError, ["x", "8", "7, 9"]),
    ],
    ids=[
        "grad_width",
        "grad_tokens",
        "grad_shape",
        "u_width",
        "u_half",
        "u_bfloat16",
        "kept_width",
        "kept_rows",
        "kept_dtype",
        "x_width",
    ],
)
def test_raw_backward_refuses(change: dict, error: type[Exception], parts: list[str]) -> None:
    x, base, *adapter = GOOD.inputs().tensors.values()
    _, u, kept = torch.ops.gralora_ext.gralora(x, base, *adapter, None, 0.5, 0.0)

    def call(grad: Tensor, x: Tensor, u: Tensor, kept: Tensor) -> object:
        return torch.ops.gralora_ext.gralora_backward(grad, x, u, kept, *adapter, None, 0.5, 0.0, [True] * 5)

    assert_refused(call, {"grad": torch.ones_like(base), "x": x, "u": u, "kept": kept, **change}, error, parts)


def test_eager_functions_refuse_other_counts_and_types() -> None:
    native, x, none = load(), torch.zeros(2, 8), (None, None, None)
    for function in (native.gralora_into, native.linear, native.merge_into, native.may_write_into):
        with pytest.raises(TypeError, match=r"\d+ arguments were expected, but 3 came"):
            function(x, x, x)
    for function, second, before, after in (
        (native.gralora_into, "gralora_into: base", (), (0.0,)),
        (native.linear, "linear: weight", (None,), (0.0, True)),
    ):
        with pytest.raises(TypeError, match=f"{second} must be a tensor, but is str"):
            function(x, "text", *before, x, x, *none, 0.5, *after)
        with pytest.raises(TypeError, match="must be real number, not str"):
            function(x, x, *before, x, x, *none, "text", *after)
    weight, *adapter = torch.zeros(10, 8), *GOOD.inputs().adapter().values()
    with pytest.raises(TypeError, match="linear: bias must be a tensor or None, but is list"):
        native.linear(x, x, [1.0], x, x, *none, 0.5, 0.0, True)
    with pytest.raises(TypeError, match="merge_into: A must be a tensor, but is str"):
        native.merge_into(weight, "text", *adapter[1:], 0.5, False)
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        native.merge_into(weight, *adapter, 0.5, x)
    assert not weight.any()
    assert not native.may_write_into("text", x) and not native.may_write_into(x, x)
    assert native.may_write_into(x.clone(), x) and not native.may_write_into(nn.Parameter(x.clone()), x)


def test_eager_functions_have_the_results_and_the_errors_of_the_ops() -> None:
    x, base, *adapter = GOOD.inputs().tensors.values()
    expected = torch.ops.gralora_ext.gralora(x, base, *adapter, None, 0.5, 0.0)[0]
    y = load().gralora_into(x, base, *adapter, None, 0.5, 0.0)
    assert same_bits(y, expected) and y.data_ptr() == base.data_ptr()
    with pytest.raises(ValueError, match=r"base must be \[..., M\]"):
        load().gralora_into(x, x, *adapter, None, 0.5, 0.0)


def test_sparse_input_is_refused() -> None:
    tensors = GOOD.inputs().tensors
    with pytest.raises((TypeError, NotImplementedError), match="gralora"):
        ops.gralora(**{**tensors, "x": tensors["x"].to_sparse()}, scaling=0.5)


def on_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) else value


@each({n: e for n, e in {**ADAPTER_ERRORS, **GRALORA_ERRORS}.items() if "another_device" not in n and "none" not in n})
def test_gralora_refuses_on_meta(change: dict, error: type[Exception], parts: list[str]) -> None:
    """Where the fake kernels tell shapes, and nothing is computed."""
    arguments = {**GOOD.inputs().tensors, "scaling": 0.5, **change}
    assert_refused(ops.gralora, {name: on_meta(value) for name, value in arguments.items()}, error, parts)


@pytest.mark.parametrize("name", ["A", "B"])
def test_none_beside_a_tensor_on_meta_is_refused(name: str) -> None:
    """There torch asks the fake implementation, which has no other checks than those of devices."""
    other = {"A": "B", "B": "A"}[name]
    adapter = {**GOOD.inputs().adapter(), name: None, other: torch.zeros(2, 4, 6, device="meta")}
    with pytest.raises(TypeError, match=f"{name} must be a tensor, but is None"):
        ops.delta_weight(**adapter, scaling=0.5)
