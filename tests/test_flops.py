# SPDX-License-Identifier: Apache-2.0
"""What FlopCounterMode counts: two FLOPs per multiply-add of the path's products."""

from __future__ import annotations

import pytest
import torch
from helpers import Case
from torch.utils.flop_counter import FlopCounterMode

from gralora_ext import ops

T, N, M, k, r, h = 10, 24, 36, 2, 6, 3
CASE = Case((2, 5), k, N // k, M // k, r // k, h)
PATH = 2 * T * (r + h) * (N + M)


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_forward_and_backward_are_counted_as_their_products_are() -> None:
    tensors = {name: t.requires_grad_() for name, t in CASE.inputs().tensors.items()}
    assert counted(lambda: ops.gralora(**tensors, scaling=0.5)) == PATH
    assert counted(lambda: ops.gralora(**tensors, scaling=0.5).sum().backward()) == 3 * PATH


@pytest.mark.parametrize(
    ("wanted", "widths"),
    [(("x",), M + N), (("A", "A_general"), M + N), (("B", "B_general"), M), (("x", "A"), M + 2 * N), (("base",), 0)],
    ids=str,
)
def test_only_the_products_of_the_wanted_gradients_are_counted(wanted: tuple[str, ...], widths: int) -> None:
    tensors = CASE.inputs().tensors
    for name in wanted:
        tensors[name].requires_grad_()
    y = ops.gralora(**tensors, scaling=0.5)
    assert counted(lambda: y.sum().backward()) == 2 * T * (r + h) * widths


def test_merges_are_counted_by_block() -> None:
    adapter = CASE.inputs().adapter()
    merge = 2 * N * M * (r // k + h)
    assert counted(lambda: ops.merge_(torch.zeros(M, N), **adapter, scaling=0.5)) == merge
    assert counted(lambda: ops.delta_weight(**adapter, scaling=0.5)) == merge


@pytest.mark.parametrize("own_gemm", [False, True])
def test_a_layer_with_its_adapter_is_counted_with_its_product(own_gemm: bool) -> None:
    inputs = CASE.inputs()
    x = inputs.tensors["x"].requires_grad_()
    adapter = {name: t.requires_grad_() for name, t in inputs.adapter().items()}
    product = 2 * T * N * M
    adapted = 2 * N * M * (r // k + h) if own_gemm else PATH
    weight, outputs = torch.randn(M, N), []

    def forward() -> None:
        outputs.append(ops.linear(x, weight, None, **adapter, scaling=0.5, own_gemm=own_gemm))

    assert counted(forward) == product + adapted
    # The weights' gradients are sums over ranks, whichever way y was made; one product keeps no U.
    ranks = 2 * T * (r + h)
    weights = ranks * (2 * M + N + (N if own_gemm else 0))
    dx = product + (adapted if own_gemm else ranks * N)
    assert counted(lambda: outputs[0].sum().backward()) == dx + weights
