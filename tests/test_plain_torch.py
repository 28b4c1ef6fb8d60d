# SPDX-License-Identifier: Apache-2.0
"""Where the fused ops cannot go plain torch operations take their place: other devices, torch.func, forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import Case, assert_near, run_python, value_and_gradients
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import backend_registration
from tuner_helpers import adapted, pair, rows

from gralora_ext import kernels, ops, selftest
from gralora_ext._loader import load

CASE = Case((5,), 2, 6, 4, 3, 2)


@pytest.fixture
def inputs() -> tuple[dict[str, Tensor], Tensor]:
    made = CASE.inputs()
    return made.tensors, made.grad


def loss_of(tensors: dict[str, Tensor], weights: Tensor, **changes: Tensor) -> Tensor:
    return (ops.gralora(**{**tensors, **changes}, scaling=CASE.scaling) * weights).sum()


@pytest.mark.parametrize("name", ["x", "base", "A", "B", "A_general", "B_general"])
def test_grad_of_torch_func_is_autograds(name: str, inputs: tuple[dict[str, Tensor], Tensor]) -> None:
    tensors, weights = inputs
    expected = value_and_gradients(ops.gralora, CASE.inputs())[name]
    assert_near("y", grad(lambda t: loss_of(tensors, weights, **{name: t}))(tensors[name]), expected.double())


def test_gradients_of_each_sample_are_those_of_a_loop(inputs: tuple[dict[str, Tensor], Tensor]) -> None:
    tensors, weights = inputs
    x, base = tensors.pop("x"), tensors.pop("base")

    def loss(A: Tensor, x: Tensor, base: Tensor, weights: Tensor) -> Tensor:
        return (ops.gralora(x, base, **{**tensors, "A": A}, scaling=CASE.scaling) * weights).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(tensors["A"], x, base, weights)
    one_by_one = [grad(loss)(tensors["A"], *row) for row in zip(x, base, weights, strict=True)]
    assert each.shape == (5, *tensors["A"].shape)
    torch.testing.assert_close(each, torch.stack(one_by_one))


def test_jvp_is_the_linear_part(inputs: tuple[dict[str, Tensor], Tensor]) -> None:
    """y is linear in A, so its derivative along a direction is what the direction adds."""
    tensors, _ = inputs
    A, direction = tensors["A"], torch.randn_like(tensors["A"])

    def y(A: Tensor) -> Tensor:
        return ops.gralora(**{**tensors, "A": A}, scaling=0.5)

    value, tangent = jvp(y, (A,), (direction,))
    torch.testing.assert_close(value, y(A))
    torch.testing.assert_close(tangent, y(A + direction) - y(A))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(y(forward_ad.make_dual(A, direction)))
    torch.testing.assert_close(dual.tangent, tangent)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("name", ["x", "base", "A", "weight"])
def test_an_op_called_by_itself_in_forward_mode_is_refused(
    name: str, grad_mode: bool, inputs: tuple[dict[str, Tensor], Tensor]
) -> None:
    """As a compiled or exported program calls it."""
    tensors, _ = inputs
    tensors["weight"] = torch.randn(tensors["base"].shape[-1], tensors["x"].shape[-1])
    with torch.set_grad_enabled(grad_mode), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        tensors[name] = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        x, A, B = tensors["x"], tensors["A"], tensors["B"]
        if name == "weight":
            torch.ops.gralora_ext.linear(x, tensors["weight"], None, A, B, None, None, None, 0.5, 0.0, True)
        else:
            torch.ops.gralora_ext.gralora(x, tensors["base"], A, B, None, None, None, 0.5, 0.0)


def test_an_exported_layer_drops_no_tangent_in_silence() -> None:
    _, fused = pair()
    x = rows(3)
    program = torch.export.export(fused, (x,)).module()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="jvp"):
        jvp(program, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_gradients_of_each_sample_of_a_model_are_pefts(hybrid_r: int) -> None:
    stock, fused = pair(hybrid_r=hybrid_r)
    x = rows(3)

    def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        kept = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}

        def loss(trained: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, {**trained, **kept}, (x[None],)).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(trained, x)

    expected, got = gradients(stock), gradients(fused)
    assert got.keys() == expected.keys() and got
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_a_transform_compiles_in_one_graph_and_a_plain_call_beside_it_keeps_the_kernel(hybrid_r: int) -> None:
    torch.compiler.reset()
    model, x = adapted("fused", hybrid_r=hybrid_r), rows(3)
    layer = model.base_model.model.first
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    graphs: list[torch.fx.GraphModule] = []

    def both(parameters: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return grad(loss)(parameters, x), layer(x)

    compiled = torch.compile(both, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    gradients, y = compiled(parameters, x)
    expected, expected_y = both(parameters, x)
    torch.testing.assert_close(y, expected_y)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name])
    (graph,) = graphs
    ours = [n for n in graph.graph.nodes if getattr(n.target, "namespace", "") == "gralora_ext"]
    assert len(ours) == 1


@pytest.mark.parametrize(
    ("arch", "capability", "covered"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (7, 5), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("12.0+PTX", (12, 1), True),
        ("7.5+PTX", (9, 0), True),
    ],
)
def test_code_runs_on_devices_of_its_version_and_ptx_on_later_ones(arch, capability, covered) -> None:
    assert kernels._covers(arch, capability) is covered


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a card of 8.9"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA L40S")
    kernels._reason_that_was_told.cache_clear()
    yield
    kernels._reason_that_was_told.cache_clear()


def built_for(monkeypatch: pytest.MonkeyPatch, *archs: str) -> None:
    extension = SimpleNamespace(build=lambda: {"cuda_archs": list(archs)})
    monkeypatch.setattr(kernels, "_native", extension)
    monkeypatch.setattr(selftest._loader, "load", lambda: extension)


@pytest.mark.usefixtures("ada")
def test_a_card_without_kernels_gets_one_warning_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    built_for(monkeypatch, "7.5", "9.0+PTX")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [kernels.has_kernels(torch.device("cuda", 0)) for _ in range(3)] == [False] * 3
        assert selftest.devices() == [torch.device("cpu")]
    (warning,) = said
    assert str(warning.message) == (
        "gralora_ext was built for CUDA devices of compute capability 7.5, 9.0+PTX, and cuda:0, NVIDIA L40S, is of 8.9 (to have "
        "kernels for it, run `TORCH_CUDA_ARCH_LIST=8.9 pip install --no-build-isolation .` in its source tree): GraLoRA layers "
        "run there on plain torch operations, with the same results but slower"
    )


@pytest.mark.usefixtures("ada")
def test_a_card_with_kernels_is_tried_by_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    built_for(monkeypatch, "7.5+PTX")
    assert selftest.devices() == [torch.device("cpu"), torch.device("cuda", 0)]


def test_a_device_is_looked_up_while_a_graph_is_made() -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def function(x: Tensor) -> Tensor:
        return x + 1 if kernels.has_kernels(torch.device("cuda", 0)) else x + 2

    built_for_cuda = bool(load().build()["cuda_archs"])
    kernels._reason_that_was_told.cache_clear()
    with nullcontext() if built_for_cuda else pytest.warns(UserWarning, match="no CUDA kernels.*plain torch"):
        y = function(torch.zeros(1))
    assert y.item() == (1 if built_for_cuda else 2)


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch fakes no device"
)
def test_a_device_without_kernels_gets_the_same_results_and_one_warning() -> None:
    run_python(
        """
import warnings
import torch
from fake_card import CardTensor
from helpers import Case
from tuner_helpers import adapted, rows
from gralora_ext import ops

case = Case((2, 5), 2, 6, 4, 3, 2)

def results(device, p):
    inputs = case.inputs()
    tensors = {name: t.to(device).requires_grad_() for name, t in inputs.tensors.items()}
    torch.manual_seed(3)
    y = ops.gralora(**tensors, scaling=0.5, dropout_p=p)
    gradients = torch.autograd.grad(y, list(tensors.values()), inputs.grad.to(device))
    adapter = {name: t.detach() for name, t in tensors.items() if name not in ("x", "base")}
    weight = ops.merge_(torch.ones(8, 12).to(device), **adapter, scaling=0.5)
    return [y, *gradients, weight, ops.delta_weight(**adapter, scaling=0.5)]

def near(card, cpu):
    assert isinstance(card, CardTensor)
    torch.testing.assert_close(card.detach().held, cpu.detach())

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for p in (0.0, 0.4):
        for card, cpu in zip(results("card", p), results("cpu", p), strict=True):
            near(card, cpu)
    model, x = adapted("fused", hybrid_r=2), rows(3)
    y = model(x)
    y.sum().backward()
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model.to("card")
    near(model(x.to("card")), y)
    model(x.to("card")).sum().backward()
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), expected, strict=True):
        near(parameter.grad, gradient)
    texts = [str(w.message) for w in said if "gralora" in str(w.message)]
assert len(texts) == 1 and "none for card devices" in texts[0] and "plain torch" in texts[0], texts
""",
        timeout=120,
    )
