# SPDX-License-Identifier: Apache-2.0
"""What torch's own machinery asks of an operation: opcheck, fake tensors, torch.compile, export, the FLOP counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import LAYOUTS, NAMES, Case, assert_near, same_bits, value_and_gradients
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gralora_ext import ops

native = torch.ops.gralora_ext
SMALL = Case(leading=(3,), n=5, m=3, rb=2)
CASES = {
    "fp32-2d": SMALL,
    "fp32-1d-hybrid": replace(SMALL, leading=(), h=2),
    "bf16-3d-hybrid": replace(SMALL, leading=(2, 3), h=2, x_dtype=torch.bfloat16, base_dtype=torch.bfloat16),
    "fp16-empty": replace(SMALL, leading=(0,), x_dtype=torch.float16, base_dtype=torch.float16),
    "fp64-column_stride": replace(
        SMALL, leading=(2, 3), x_layout="column_stride", base_layout="column_stride", grad_layout="row_slice"
    ).uniform(torch.float64),
    "fp32-transposed-hybrid": replace(SMALL, leading=(2, 3), h=2, x_layout="transposed", base_layout="transposed"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def forward_arguments(case: Case, dropout_p: float, device: torch.device, requires_grad: bool) -> tuple:
    tensors = {name: t.requires_grad_(requires_grad) for name, t in case.inputs(device).tensors.items()}
    x, base, A, B = (tensors[name] for name in ("x", "base", "A", "B"))
    seed = torch.tensor([7], device=device) if dropout_p else None
    return x, base, A, B, tensors.get("A_general"), tensors.get("B_general"), seed, 0.5, dropout_p


def backward_arguments(case: Case, dropout_p: float, device: torch.device) -> tuple:
    forward = forward_arguments(case, dropout_p, device, False)
    left = native.gralora(*forward)[1:]
    x, _, *rest = forward
    return case.inputs(device).grad, x, *left, *rest, [True, True, True, bool(case.h), bool(case.h)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5], ids=["", "dropout"])
@each_case
def test_opcheck_passes_gralora(case: Case, dropout_p: float, device: torch.device) -> None:
    torch.library.opcheck(native.gralora.default, forward_arguments(case, dropout_p, device, True))


@each_case
def test_opcheck_passes_gralora_with_y_in_base(case: Case, device: torch.device) -> None:
    """Not aot_dispatch: an operation that returns what it writes into is for eager mode."""
    with torch.no_grad():
        arguments = forward_arguments(case, 0.5, device, False)
        if arguments[1].is_contiguous():
            utils = ("test_schema", "test_faketensor")
            torch.library.opcheck(native.gralora_.default, arguments, test_utils=utils)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=lambda d: f"adapter_{NAMES[d]}")
@pytest.mark.parametrize("rb", [1, 20], ids=["few ranks", "many ranks"])
def test_opcheck_passes_beside_a_16_bit_x(rb: int, adapter: torch.dtype, device: torch.device) -> None:
    """U is kept, except for many ranks of float32 parameters.

    Eager mode gets the gradient of a sum as one expanded number, the compiled one as a tensor, whose pairs are multiplied and
    dH rounded where all is bfloat16: they differ by an ulp of that.
    """
    case = Case((5,), 2, 80, 60, rb, x_dtype=torch.bfloat16, base_dtype=torch.bfloat16, adapter_dtype=adapter)
    torch.library.opcheck(native.gralora.default, forward_arguments(case, 0.5, device, True), atol=1e-2, rtol=1.6e-2)
    torch.library.opcheck(native.gralora_backward.default, backward_arguments(case, 0.5, device))


@each_case
def test_opcheck_passes_gralora_backward(case: Case, device: torch.device) -> None:
    torch.library.opcheck(native.gralora_backward.default, backward_arguments(case, 0.5, device))


@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["", "fan_in_fan_out"])
@pytest.mark.parametrize(
    "case", [CASES[name] for name in ("fp32-2d", "bf16-3d-hybrid")], ids=["fp32-2d", "bf16-hybrid"]
)
def test_opcheck_passes_merge_and_delta_weight(case: Case, fan_in_fan_out: bool, device: torch.device) -> None:
    _, _, *adapter, _, scaling, _ = forward_arguments(case, 0.0, device, False)
    torch.library.opcheck(native.delta_weight.default, (*adapter, scaling, fan_in_fan_out))
    weight = native.delta_weight(*adapter, 1.0, fan_in_fan_out).to(case.base_dtype)
    torch.library.opcheck(native.merge_.default, (weight, *adapter, scaling, fan_in_fan_out))


@pytest.mark.parametrize("leading", [(), (0, 2), (5,), (2, 3, 4)], ids=lambda s: f"{s}")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_results_have_the_sizes_strides_and_dtypes_of_real_ones(
    layout: str, leading: tuple[int, ...], device: torch.device
) -> None:
    layouts = {"x_layout": layout, "base_layout": layout, "adapter_layout": layout, "grad_layout": layout}
    case = replace(SMALL, leading=leading, h=2, x_dtype=torch.bfloat16, base_dtype=torch.float16, **layouts)
    for op, arguments in (
        (native.gralora, forward_arguments(case, 0.5, device, False)),
        (native.gralora_backward, backward_arguments(case, 0.5, device)),
        (native.delta_weight, (*forward_arguments(case, 0.0, device, False)[2:6], 0.5, False)),
    ):
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        for r, f in zip(*((t,) if isinstance(t, Tensor) else t for t in (real, fake)), strict=True):
            assert (f.shape, f.dtype, f.device) == (r.shape, r.dtype, r.device)
            assert f.stride() == r.stride() or r.numel() == 0  # torch's own empty_like differs there


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
@each_case
def test_compiled_forward_and_backward_are_the_eager_ones_without_a_graph_break(
    case: Case, dropout_p: float, device: torch.device
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(ops.gralora, backend="aot_eager", fullgraph=True)
    inputs = case.inputs(device)
    torch.manual_seed(9)
    eager = value_and_gradients(ops.gralora, inputs, dropout_p=dropout_p)
    torch.manual_seed(9)
    traced = value_and_gradients(compiled, inputs, dropout_p=dropout_p)
    assert all(same_bits(traced[name], eager[name]) for name in eager)


def test_one_compiled_graph_serves_every_number_of_tokens(device: torch.device) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return graph

    compiled = torch.compile(ops.gralora, backend=count, fullgraph=True, dynamic=True)
    for tokens in (7, 30, 301):
        inputs = replace(SMALL, leading=(2, tokens), h=2).inputs(device)
        y = compiled(**inputs.tensors, scaling=0.5)
        assert same_bits(y, ops.gralora(**inputs.tensors, scaling=0.5))
    assert len(graphs) == 1


def test_compiled_merge_writes_the_weight(device: torch.device) -> None:
    torch.compiler.reset()
    adapter = SMALL.inputs(device).adapter()

    def merged_and_doubled(weight: Tensor) -> Tensor:
        ops.merge_(weight, **adapter, scaling=0.5)
        return weight * 2

    weights = [torch.ones(6, 10, device=device) for _ in range(2)]
    doubled = torch.compile(merged_and_doubled, backend="aot_eager", fullgraph=True)(weights[0])
    assert same_bits(doubled, merged_and_doubled(weights[1]))
    assert same_bits(*weights)


class Layer(nn.Module):
    """A linear layer with an adapter, as ``torch.export`` takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(10, 6)
        self.A, self.B = (nn.Parameter(t) for t in SMALL.inputs().adapter().values())

    def forward(self, x: Tensor) -> Tensor:
        return ops.gralora(x, self.base(x), self.A, self.B, scaling=0.5)


def test_exported_program_keeps_the_op_and_gives_its_results(device: torch.device) -> None:
    layer = Layer().to(device)
    x = torch.randn(4, 10, device=device)
    dynamic = {"x": {0: torch.export.Dim("tokens", min=2, max=100)}}
    exported = torch.export.export(layer, (x,), dynamic_shapes=dynamic)
    assert any(node.target is native.gralora.default for node in exported.graph.nodes)
    longer = torch.randn(57, 10, device=device)
    assert_near("y", exported.module()(longer), layer(longer).double())


def test_autocast_leaves_the_dtypes_alone(device: torch.device) -> None:
    inputs = SMALL.inputs(device)
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.gralora(**inputs.tensors, scaling=0.5)
    assert same_bits(y, ops.gralora(**inputs.tensors, scaling=0.5))


@pytest.mark.parametrize("mode", ["kernels", "plain torch"])
def test_autocast_leaves_the_dtypes_of_a_layer_alone(mode: str, device: torch.device) -> None:
    tensors = SMALL.inputs(device).tensors
    weight = torch.randn(tensors["base"].shape[-1], tensors["x"].shape[-1], device=device)
    tensors["x"].requires_grad_()
    del tensors["base"]

    def layer(x: Tensor) -> Tensor:
        return ops.linear(**{**tensors, "x": x}, weight=weight, bias=None, scaling=0.5, own_gemm=False)

    found = []
    for autocast in (True, False):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = layer(tensors["x"]) if mode == "kernels" else torch.func.jvp(layer, (tensors["x"],), (tensors["x"],))[0]
        found.append((y, *(torch.autograd.grad(y.sum(), tensors["x"]) if mode == "kernels" else ())))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["fp32-2d", "fp32-1d-hybrid", "bf16-3d-hybrid"])
def test_compiled_autograd_gives_the_same_gradients(name: str, device: torch.device) -> None:
    """It packs what the node has saved and calls the same backward, so a node that it cannot pack fails here."""
    inputs = CASES[name].inputs(device)
    leaves = {n: t.requires_grad_() for n, t in inputs.tensors.items() if n != "base"}
    expected = value_and_gradients(ops.gralora, inputs)

    y = ops.gralora(**inputs.tensors, scaling=inputs.scaling)
    captures = torch._dynamo.utils.counters["compiled_autograd"]["captures"]
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: y.backward(inputs.grad), backend="eager")()
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == captures + 1
    for n, leaf in leaves.items():
        assert same_bits(leaf.grad, expected[n])
