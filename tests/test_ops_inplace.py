# SPDX-License-Identifier: Apache-2.0
"""``gralora_``: the same bits as ``gralora``, in base's memory, with torch's usual protection of what autograd has saved."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYOUTS, NAMES, Case, same_bits, value_and_gradients
from torch import Tensor

from gralora_ext import ops

CASE = Case(leading=(3, 17), k=2, n=40, m=37, rb=3, h=2)


def into_a_copy(x: Tensor, base: Tensor, *args: Tensor, **others: Tensor | float) -> Tensor:
    base = base.clone(memory_format=torch.preserve_format)
    y = ops.gralora_(x, base, *args, **others)
    assert y.data_ptr() == base.data_ptr() and y.shape == base.shape and y.stride() == base.stride()
    return y


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=NAMES.get)
def test_values_and_gradients_are_those_of_the_functional_op(
    dtype: torch.dtype, dropout_p: float, device: torch.device
) -> None:
    inputs = CASE.uniform(dtype).inputs(device)
    torch.manual_seed(3)
    expected = value_and_gradients(ops.gralora, inputs, dropout_p=dropout_p)
    torch.manual_seed(3)
    results = value_and_gradients(into_a_copy, inputs, dropout_p=dropout_p)
    assert all(same_bits(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("expanded")])
def test_base_may_have_any_strides(layout: str, device: torch.device) -> None:
    inputs = Case(leading=(3, 17), k=2, n=40, m=36, rb=3, base_layout=layout).inputs(device)
    base = inputs.tensors["base"]
    expected = ops.gralora(**inputs.tensors, scaling=0.5)
    y = ops.gralora_(**inputs.tensors, scaling=0.5)
    assert y.data_ptr() == base.data_ptr() and same_bits(y, expected) and same_bits(base, expected)


def test_the_graph_goes_through_base_even_where_base_is_a_view(device: torch.device) -> None:
    inputs = CASE.inputs(device)
    wide = torch.randn(3, 17, 80, device=device, requires_grad=True)
    inputs.tensors["base"] = (wide * 2)[..., 3:77]
    y = ops.gralora_(**inputs.tensors, scaling=0.5)
    (grad,) = torch.autograd.grad(y, wide, inputs.grad)
    assert same_bits(grad[..., 3:77], 2 * inputs.grad)
    assert not grad[..., :3].any() and not grad[..., 77:].any()


def test_backward_of_what_has_saved_base_raises(device: torch.device) -> None:
    inputs = CASE.inputs(device)
    leaf = inputs.tensors["base"].requires_grad_()
    inputs.tensors["base"] = leaf.exp()  # saves its result
    y = ops.gralora_(**inputs.tensors, scaling=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_of_what_has_saved_y_raises_where_base_is_changed_later(device: torch.device) -> None:
    inputs = CASE.inputs(device)
    inputs.tensors["A"].requires_grad_()
    y = ops.gralora_(**inputs.tensors, scaling=0.5)
    loss = y.square().sum()  # saves y
    inputs.tensors["base"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_lazy_clone_keeps_its_own_numbers(device: torch.device) -> None:
    tensors = CASE.inputs(device).tensors
    original, before = tensors["base"], tensors["base"].clone()
    tensors["base"] = torch._lazy_clone(original)
    expected = ops.gralora(**{**tensors, "base": before}, scaling=0.5)
    assert same_bits(ops.gralora_(**tensors, scaling=0.5), expected)
    assert same_bits(original, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"base": t["base"].requires_grad_()}, "base is a leaf that requires grad"),
        (lambda t: {"base": t["base"].requires_grad_()[:]}, "base is a leaf that requires grad, or a view of one"),
    ],
    ids=["leaf", "view of a leaf"],
)
def test_refuses_what_it_cannot_write_into(change, message: str, device: torch.device) -> None:
    inputs = CASE.inputs(device)
    inputs.tensors.update(change(inputs.tensors))
    before = inputs.tensors["base"].detach().clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.gralora_(**inputs.tensors, scaling=0.5)
    assert same_bits(inputs.tensors["base"].detach(), before)


@pytest.mark.parametrize("name", ["x", "A", "B", "A_general", "B_general", "base"])
def test_inference_tensors_are_refused_before_base_is_written(name: str, device: torch.device) -> None:
    inputs = CASE.inputs(device)
    tensors = inputs.tensors
    with torch.inference_mode():
        tensors[name] = tensors[name].clone()
    trained = "B" if name == "A" else "A"
    tensors[trained].requires_grad_()
    before = tensors["base"].clone()
    with pytest.raises(RuntimeError, match=f"{name} must not be an inference tensor"):
        ops.gralora_(**tensors, scaling=0.5)
    assert same_bits(tensors["base"], before)
    if name != "base":
        with pytest.raises(RuntimeError, match=f"{name} must not be an inference tensor"):
            ops.gralora(**tensors, scaling=0.5)
