# SPDX-License-Identifier: Apache-2.0
"""What CUDA adds to the operations: streams, devices, graphs, no waiting; and that both devices compute the same.

Runs with ``--device cuda`` on a machine with a GPU; ``scripts/gpu_check.sh`` runs all that needs one.
"""

from __future__ import annotations

import pytest
import torch
from helpers import Case, assert_near, assert_results_near, same_bits, value_and_gradients

from gralora_ext import ops, reference
from gralora_ext.tolerances import tolerance

BF16 = {"x_dtype": torch.bfloat16, "base_dtype": torch.bfloat16}
F16 = {"x_dtype": torch.float16, "base_dtype": torch.float16}
CASES = [
    Case((131,), 2, 72, 88, 6),
    Case((131,), 3, 37, 65, 4, 5),
    Case((2, 3, 83), 4, 160, 96, 16, 3, **BF16),
    Case((257,), 2, 288, 768, 16, **BF16, adapter_dtype=torch.bfloat16),
    Case((40,), 2, 64, 96, 8, **F16),
    Case((1,), 2, 1024, 1024, 16, **BF16),
    Case((33,), 2, 12, 20, 3).uniform(torch.float64),
    Case((33,), 2, 12, 20, 3, 2, torch.bfloat16, torch.float32, torch.float16),
]


@pytest.fixture(autouse=True)
def _on_cuda(device: torch.device, request: pytest.FixtureRequest) -> None:
    """On an emulated device too, where a test asks for nothing but passes."""
    if device.type == "cpu" or (device.type != "cuda" and "sanitized" not in request.node.name):
        pytest.skip("needs --device cuda")


def call(case: Case, device: torch.device, dropout_p: float = 0.3) -> dict[str, torch.Tensor]:
    torch.manual_seed(case.seed)
    return value_and_gradients(ops.gralora, case.inputs(device), dropout_p=dropout_p)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sanitized_passes_are_right_and_repeat_to_the_bit(case: Case, device: torch.device) -> None:
    """The tests of this name also run under compute-sanitizer."""
    actual = call(case, device)
    torch.manual_seed(case.seed)
    assert_results_near(actual, case.inputs(device), dropout_p=0.3, seed=reference.draw_seed(device).cpu())
    again = call(case, device)
    assert all(same_bits(actual[name], again[name]) for name in actual)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_sanitized_frozen_layer_is_the_op_on_torchs_layer(case: Case, dropout_p: float, device: torch.device) -> None:
    """y to the bit, and dx, of which both parts are rounded on their way."""
    inputs = case.inputs(device)
    x, weight = (
        inputs.tensors["x"].requires_grad_(),
        torch.randn(case.k * case.m, case.k * case.n).to(inputs.tensors["x"]),
    )
    options = {**inputs.adapter(), "scaling": 0.5, "dropout_p": dropout_p}
    torch.manual_seed(7)
    y = ops.linear(x, weight, None, **options, own_gemm=False)
    torch.manual_seed(7)
    expected = ops.gralora(x, torch.nn.functional.linear(x, weight), **options)
    assert same_bits(y, expected)
    (dx,), (two,) = (torch.autograd.grad(each, x, inputs.grad.to(each)) for each in (y, expected))
    assert_near("dx", dx, two.cpu(), bound=2 * tolerance(dx, (dx.dtype,), gradient=True))


def test_a_frozen_layer_is_torchs_gemm_alone_on_cuda(device: torch.device) -> None:
    inputs = CASES[0].inputs(device)
    weight = torch.zeros(2 * 88, 2 * 72, device=device)
    with pytest.raises(ValueError, match="with own_gemm all tensors must be on the CPU, but x is on cuda"):
        ops.linear(inputs.tensors["x"], weight, None, **inputs.adapter(), scaling=0.5)


@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sanitized_merges_are_right(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    case = Case((1,), 3, 37, 65, 4, 5)
    adapter = case.inputs(device).adapter()
    memory = torch.randn(3 * 65, 2 * 3 * 37, device=device).to(dtype)
    weight = {"rows": memory[:, : 3 * 37], "columns": memory[:, : 3 * 37].T.contiguous().T, "neither": memory[:, ::2]}
    merged = weight[layout]
    wide = {name: t.cpu().double() for name, t in adapter.items()}
    expected = reference.merge_(merged.cpu().double(), **wide, scaling=0.75)
    ops.merge_(merged, **adapter, scaling=0.75)
    assert_near("weight", merged, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_devices_compute_the_same(case: Case, device: torch.device) -> None:
    seed = torch.tensor([4711])
    results = []
    for place in ("cpu", device):
        t = case.inputs(place).tensors
        general = t.get("A_general"), t.get("B_general")
        args = (t["x"], t["base"], t["A"], t["B"], *general, seed.to(place), case.scaling, 0.25)
        results.append(torch.ops.gralora_ext.gralora(*args))
    assert_near("y", results[1][0], results[0][0].cpu())
    assert results[0][1].shape == results[1][1].shape and results[0][1].dtype == results[1][1].dtype


def test_the_mask_is_the_cpus_to_the_bit(device: torch.device) -> None:
    seed = torch.tensor([-(2**40) - 3], device=device)
    for width in (4, 35, 132, 4099):
        x, unit = torch.ones(70, width, device=device), torch.eye(width, device=device).unsqueeze(0)
        y = torch.ops.gralora_ext.gralora(x, torch.zeros_like(x), unit, unit, None, None, seed, 1.0, 0.3)[0]
        assert torch.equal((y != 0).cpu(), reference.dropout_mask(seed.cpu(), x.shape, 0.3))


def test_nothing_waits_for_the_device(device: torch.device) -> None:
    case = Case((65,), 2, 64, 96, 8, 3, **BF16)
    call(case, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs = case.inputs("cpu")
        tensors = {name: t.pin_memory().to(device, non_blocking=True) for name, t in inputs.tensors.items()}
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        y = ops.gralora(**leaves, scaling=0.5, dropout_p=0.3)
        y.backward(torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used(device: torch.device) -> None:
    inputs = Case((300,), 2, 512, 512, 16, **BF16).inputs(device)
    expected = ops.gralora(**inputs.tensors, scaling=0.5)
    stream = torch.cuda.Stream()
    late = {name: torch.empty_like(t) for name, t in inputs.tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what the stream copies is not there yet for any other stream
        for name, t in inputs.tensors.items():
            late[name].copy_(t)
        y = ops.gralora(**late, scaling=0.5)
    stream.synchronize()
    assert same_bits(y, expected)


def test_a_captured_graph_draws_new_masks(device: torch.device) -> None:
    inputs = Case((64,), 2, 64, 96, 8).inputs(device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.gralora(**inputs.tensors, scaling=1.0, dropout_p=0.5)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.gralora(**inputs.tensors, scaling=1.0, dropout_p=0.5)
    torch.manual_seed(5)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


def test_another_device_than_the_current_one(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    case = Case((65,), 2, 64, 96, 8, 3)
    assert torch.cuda.current_device() == 0
    results = call(case, torch.device("cuda", 1), 0.0)
    assert all(t.device.index == 1 for t in results.values()) and torch.cuda.current_device() == 0
    assert_results_near(results, case.inputs("cuda:1"))


def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    T, N = 2**17 + 3, 2**14
    if torch.cuda.mem_get_info()[0] < 6 * T * N:
        pytest.skip("needs 13 GB of free memory")
    A, B = torch.randn(2, N // 2, 8, device=device), torch.randn(2, 8, 64, device=device)
    x = torch.randn(T, N, device=device, dtype=torch.bfloat16)
    y = ops.gralora(x, torch.zeros(T, 128, device=device, dtype=torch.bfloat16), A, B, scaling=0.01)
    last = x[-5:].cpu().double(), torch.zeros(5, 128, dtype=torch.float64)
    expected = reference.gralora(*last, A.cpu().double(), B.cpu().double(), scaling=0.01)
    assert_near("y", y[-5:], expected)
