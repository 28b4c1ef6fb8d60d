# SPDX-License-Identifier: Apache-2.0
"""``ops.linear``, a frozen layer and its adapter in one operation: against torch's layer and the reference in float64.

``linear`` is it by either GEMM: our one product, or torch's with the path added in place.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import EXTREME_SIZES, LAYOUTS, NAMES, Case, cases, same_bits, threads
from hypothesis import given, settings
from linear_helpers import FP32, assert_layer_near, kept_for_backward, layer_cases, layer_inputs, native, results
from torch import Tensor

from gralora_ext import ops

pytestmark = pytest.mark.skipif("config.getoption('device') != 'cpu'", reason="this operation is for the CPU")


@pytest.fixture(params=[True, False], ids=["own GEMM", "torch's GEMM"])
def linear(request: pytest.FixtureRequest) -> Any:
    return partial(ops.linear, own_gemm=request.param)


@given(case=layer_cases())
@settings(max_examples=150)
def test_the_layer_is_torchs_and_the_references_in_random_cases(case: Case) -> None:
    assert_layer_near(layer_inputs(case))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_weight_and_dtype_of_the_adapter(layout: str, adapter: torch.dtype, linear: Any) -> None:
    assert_layer_near(layer_inputs(replace(FP32, h=3, adapter_dtype=adapter), layout, bias_layout=layout), linear)


@pytest.mark.parametrize("layout", ["offset", "row_slice", "column_stride", "transposed"])
def test_every_layout_of_the_adapter(layout: str) -> None:
    assert_layer_near(layer_inputs(replace(FP32, h=3, n=33, m=41, adapter_layout=layout)))


@pytest.mark.parametrize(("k", "n", "m", "rb", "h"), EXTREME_SIZES)
def test_extreme_sizes(k: int, n: int, m: int, rb: int, h: int, linear: Any) -> None:
    assert_layer_near(layer_inputs(Case((65,), k, n, m, rb, h)), linear)


@pytest.mark.parametrize(("N", "M"), [(576, 1536), (1536, 192), (2100, 290)])
@pytest.mark.parametrize("T", [1, 12, 150, 700])
def test_widths_of_several_chunks_and_runs(T: int, N: int, M: int) -> None:
    """2100 rows of P do not fit in L2 beside each other: a strip is made in runs."""
    assert_layer_near(layer_inputs(Case((T,), 2, N // 2, M // 2, 8, 4), bias=False))


@given(case=layer_cases())
@settings(max_examples=60)
def test_results_do_not_depend_on_the_number_of_threads_in_random_cases(case: Case) -> None:
    assert_same_bits_for_any_threads(case)


@pytest.mark.parametrize("T", [97, 770])
@pytest.mark.parametrize(("n", "m"), [(288, 96), (576, 100), (64, 700)])
def test_results_do_not_depend_on_the_number_of_threads(T: int, n: int, m: int) -> None:
    assert_same_bits_for_any_threads(Case((T,), 2, n, m, 8, 5))


def assert_same_bits_for_any_threads(case: Case) -> None:
    inputs = layer_inputs(case)
    with threads(1):
        one = results(inputs)
    for count in (2, 3, 8):
        with threads(count):
            many = results(inputs)
        assert all(same_bits(many[name], one[name]) for name in one)


def test_rows_do_not_depend_on_the_rows_beside_them() -> None:
    inputs = layer_inputs(FP32)
    clean = ops.linear(**inputs.tensors, scaling=1.0)
    inputs.tensors["x"][33, 5] = float("nan")
    y = ops.linear(**inputs.tensors, scaling=1.0)
    others = [t for t in range(70) if t != 33]
    assert same_bits(y[others], clean[others]) and y[33].isnan().all()


@pytest.mark.parametrize("scaling", [0.0, 0.5])
def test_an_adapter_that_is_zero_leaves_the_layer_as_it_is(scaling: float) -> None:
    """To the bit: W + 0 is W, whatever the adapter's rank and grid."""
    inputs = layer_inputs(replace(FP32, h=3))
    zero = {name: t if scaling == 0.0 else t * 0 for name, t in inputs.adapter().items() if name.startswith(("A", "B"))}
    layer = {name: inputs.tensors[name] for name in ("x", "weight", "bias")}
    y = ops.linear(**layer, **zero, scaling=scaling)
    plain = ops.linear(**layer, A=torch.zeros(1, 96, 1), B=torch.zeros(1, 1, 80), scaling=1.0)
    assert same_bits(y, plain)


@pytest.mark.parametrize("leading", [(0,), (0, 4), (4, 0)], ids=str)
def test_no_tokens_give_empty_results_and_no_gradient(leading: tuple[int, ...], linear: Any) -> None:
    got = results(layer_inputs(replace(FP32, leading=leading, h=2)), linear)
    assert got["y"].shape == (*leading, 80) and got["x"].shape == (*leading, 96)
    assert not any(got[name].any() for name in ("A", "B", "A_general", "B_general"))


def test_no_input_is_written(linear: Any) -> None:
    inputs = layer_inputs(replace(FP32, h=3))
    before = {name: t.clone() for name, t in inputs.tensors.items()}
    results(inputs, linear)
    assert all(same_bits(inputs.tensors[name], t) for name, t in before.items())


@pytest.mark.parametrize("wanted", ["x", "A", "B", "A_general", "B_general"])
def test_one_gradient_alone_has_the_bits_that_it_has_among_all(wanted: str, linear: Any) -> None:
    inputs = layer_inputs(replace(FP32, h=3))
    every = results(inputs, linear)
    leaf = inputs.tensors[wanted].requires_grad_()
    y = linear(**inputs.tensors, scaling=inputs.scaling)
    assert same_bits(torch.autograd.grad(y, leaf, inputs.grad)[0], every[wanted])


def test_only_x_and_the_parameters_are_kept_for_backward() -> None:
    inputs = layer_inputs(replace(FP32, h=3))
    kept = {t.data_ptr() for t in kept_for_backward(inputs, ops.linear)}
    assert kept == {t.data_ptr() for name, t in inputs.tensors.items() if name != "bias"}


@pytest.mark.parametrize("h", [0, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("own_gemm", [True, False])
def test_gradcheck(own_gemm: bool, dropout_p: float, h: int, bias: bool) -> None:
    seed = torch.tensor([3]) if dropout_p else None
    inputs = layer_inputs(Case((5,), 2, 6, 4, 2, h).uniform(torch.float64), bias=bias)
    frozen = [inputs.tensors["weight"], inputs.tensors.get("bias")]
    x, A, B, *general = (t.requires_grad_() for name, t in inputs.tensors.items() if name not in ("weight", "bias"))

    def call(x: Tensor, *adapter: Tensor) -> Tensor:
        A, B, *general = adapter
        return native.linear(x, *frozen, A, B, *(general or (None, None)), seed, 0.5, dropout_p, own_gemm)[0]

    assert torch.autograd.gradcheck(call, (x, A, B, *general))


@pytest.mark.parametrize(("leading", "h"), [((), 0), ((2, 3), 2), ((0,), 2)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("own_gemm", [True, False])
def test_opcheck(own_gemm: bool, dropout_p: float, leading: tuple[int, ...], h: int) -> None:
    seed = torch.tensor([3]) if dropout_p else None
    inputs = layer_inputs(Case(leading, 2, 6, 4, 2, h), bias=bool(h))
    t = inputs.tensors
    adapter = (t["A"], t["B"], t.get("A_general"), t.get("B_general"))
    options = (seed, 0.5, dropout_p, own_gemm)
    layer = (t["x"], t["weight"], t.get("bias"), *adapter, *options)
    left = native.linear(*layer)[1:]
    torch.library.opcheck(
        native.linear_backward.default,
        (inputs.grad, t["x"], *left, t["weight"], *adapter, *options, [True, True, True, bool(h), bool(h)]),
    )
    for name in ("x", "A", "B", "A_general", "B_general"):
        if name in t:
            t[name].requires_grad_()
    torch.library.opcheck(native.linear.default, layer)


def test_torch_compile_gives_the_same_bits_in_one_graph(linear: Any) -> None:
    inputs = layer_inputs(replace(FP32, h=3))
    expected = results(inputs, linear)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    trained = {name: t.requires_grad_() for name, t in inputs.tensors.items() if name not in ("weight", "bias")}
    y = compiled(**inputs.tensors, scaling=inputs.scaling)
    gradients = torch.autograd.grad(y, list(trained.values()), inputs.grad)
    assert same_bits(y.detach(), expected["y"])
    assert all(same_bits(g, expected[name]) for name, g in zip(trained, gradients, strict=True))


# ---------------------------------------------------------------- by torch's GEMM

by_torch = partial(ops.linear, own_gemm=False)


@given(case=cases())
@settings(max_examples=150)
def test_by_torchs_gemm_the_layer_is_torchs_and_the_references_in_random_cases(case: Case) -> None:
    """In every dtype; one of 16 bits is rounded by the layer and by the path."""
    assert_layer_near(layer_inputs(case), by_torch)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
def test_by_torchs_gemm_it_is_the_op_on_the_output_of_torchs_layer_to_the_bit(
    x: torch.dtype, adapter: torch.dtype, bias: bool, dropout_p: float
) -> None:
    inputs = layer_inputs(replace(FP32, leading=(3, 50), h=3, x_dtype=x, adapter_dtype=adapter), bias=bias)
    layer = [inputs.tensors.get(name) for name in ("x", "weight", "bias")]
    torch.manual_seed(7)
    y = by_torch(**{"bias": None, **inputs.tensors}, scaling=0.5, dropout_p=dropout_p)
    operands = {name: t for name, t in inputs.adapter().items() if name not in ("weight", "bias")}
    torch.manual_seed(7)
    expected = ops.gralora(layer[0], torch.nn.functional.linear(*layer), **operands, scaling=0.5, dropout_p=dropout_p)
    assert same_bits(y, expected)


def test_by_torchs_gemm_x_the_parameters_and_u_are_kept_for_backward() -> None:
    inputs = layer_inputs(replace(FP32, h=3))
    kept = {t.data_ptr(): t.shape for t in kept_for_backward(inputs, by_torch)}
    given = {t.data_ptr() for name, t in inputs.tensors.items() if name != "bias"}
    assert given <= kept.keys() and [kept[other] for other in kept.keys() - given] == [(70, 2 * 8 + 3)]


# ---------------------------------------------------------------- what it refuses


def test_what_has_no_derivative_says_so(linear: Any) -> None:
    inputs = layer_inputs(FP32)
    x = inputs.tensors["x"].requires_grad_()
    y = linear(**inputs.tensors, scaling=1.0)
    (dx,) = torch.autograd.grad(y, x, inputs.grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="linear_backward"):
        dx.sum().backward()
    for name in ("weight", "bias"):
        trained = {**inputs.tensors, name: inputs.tensors[name].clone().requires_grad_()}
        with pytest.raises(RuntimeError, match=f"{name} must not require grad"):
            linear(**trained, scaling=1.0)
        with torch.no_grad():
            assert same_bits(linear(**trained, scaling=1.0), y.detach())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(7, 95)}, ValueError, ["x", "96", "7, 95"]),
        ({"x": torch.zeros(())}, ValueError, ["x", r"\.\.\., N", "[]"]),
        ({"x": torch.zeros(7, 96, dtype=torch.bfloat16)}, TypeError, ["x", "float32", "BFloat16"]),
        ({"x": torch.zeros(7, 96, dtype=torch.int64)}, TypeError, ["x", "float32", "Long"]),
        ({"x": None}, TypeError, ["x", "tensor", "None"]),
        ({"weight": None}, TypeError, ["weight", "tensor", "None"]),
        ({"B": None}, TypeError, ["B", "tensor", "None"]),
        ({"weight": torch.zeros(96, 80)}, ValueError, ["weight", "80, 96", "96, 80"]),
        ({"weight": torch.zeros(80, 96, dtype=torch.float64)}, TypeError, ["weight", "Float", "Double"]),
        ({"weight": torch.zeros(80, 96, device="meta")}, ValueError, ["weight", "cpu", "meta"]),
        ({"bias": torch.zeros(81)}, ValueError, ["bias", "80", "81"]),
        ({"bias": torch.zeros(1, 80)}, ValueError, ["bias", "80", "1, 80"]),
        ({"bias": torch.zeros(80, dtype=torch.float16)}, TypeError, ["bias", "Float", "Half"]),
        ({"A": torch.zeros(2, 48, 7)}, ValueError, ["rank", "7", "2"]),
        ({"scaling": float("nan")}, ValueError, ["scaling", "finite", "nan"]),
        ({"dropout_p": 1.0}, ValueError, ["dropout_p", "1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_raise_with_their_names(change: dict[str, Any], error: type, words: list[str]) -> None:
    arguments = {**layer_inputs(FP32).tensors, "scaling": 1.0, **change}
    with pytest.raises(error) as raised:
        ops.linear(**arguments)
    message = str(raised.value)
    assert all(re.search(re.escape(word) if "[" in word else word, message) for word in words), message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=NAMES.get)
def test_a_gradient_of_another_dtype_is_refused(dtype: torch.dtype) -> None:
    inputs = layer_inputs(FP32)
    t = inputs.tensors
    left = (torch.empty(0, 16), torch.empty(0, t["x"].shape[-1] // 8, dtype=torch.uint8))
    rest = (t["x"], *left, t["weight"], t["A"], t["B"], None, None, None, 1.0, 0.0, True, [True, *[False] * 4])
    with pytest.raises(TypeError, match="grad must have x's dtype Float"):
        native.linear_backward(inputs.grad.to(dtype), *rest)


def test_float64_adapter_beside_float32_is_refused() -> None:
    with pytest.raises(TypeError, match="with own_gemm x must be float32, or float64 where A is"):
        ops.linear(**layer_inputs(replace(FP32, adapter_dtype=torch.float64)).tensors, scaling=1.0)


def test_a_gradient_of_any_strides(linear: Any) -> None:
    for layout in LAYOUTS:
        assert_layer_near(layer_inputs(replace(FP32, leading=(4, 20), grad_layout=layout, x_layout=layout)), linear)
