# SPDX-License-Identifier: Apache-2.0
"""What the operations cost, for ``torch.utils.flop_counter.FlopCounterMode``: two FLOPs per multiply-add of a product.

With T tokens, forward is the two products of the path, ``x A`` and ``U B``: 2T(r + h)(N + M). Backward is as much for dx and as
much for the weights' gradients. A merge is 2NM(r/k + h).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._loader import load

load()
_ops = torch.ops.gralora_ext
Shape = tuple[int, ...]  # the counter gives shapes in the tensors' places


def _sizes(A: Shape, B: Shape, A_general: Shape | None) -> tuple[int, int, int]:
    """N, M and r + h."""
    return A[0] * A[1], B[0] * B[2], A[2] + (0 if A_general is None else A_general[0])


def _path(x: Shape, A: Shape, B: Shape, A_general: Shape | None) -> int:
    N, M, ranks = _sizes(A, B, A_general)
    return 2 * math.prod(x[:-1]) * ranks * (N + M)


def _path_backward(
    x: Shape, u: Shape, A: Shape, B: Shape, A_general: Shape | None, needs: list[bool], ranks_of_gradient: bool
) -> int:
    """``ranks_of_gradient``: whether dH is computed, which dA needs, and dx unless it comes from the one product with W + ΔW."""
    T, (N, M, ranks) = math.prod(x[:-1]), _sizes(A, B, A_general)
    wants_A, wants_B = needs[1] or needs[3], needs[2] or needs[4]
    widths = M * ranks_of_gradient + N * wants_A + M * wants_B
    if wants_B and u[0] < T:  # U was not kept, and is made again
        widths += N
    return 2 * T * ranks * widths


@register_flop_formula([_ops.gralora, _ops.gralora_])
def _forward(x: Shape, base: Shape, A: Shape, B: Shape, A_general: Shape | None, *args: Any, **kwargs: Any) -> int:
    return _path(x, A, B, A_general)


@register_flop_formula(_ops.gralora_backward)
def _backward(
    grad: Shape,
    x: Shape,
    u: Shape,
    kept: Shape,
    A: Shape,
    B: Shape,
    A_general: Shape | None,
    B_general: Shape | None,
    seed: Shape | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    **kwargs: Any,
) -> int:
    N, _, ranks = _sizes(A, B, A_general)
    dx = 2 * math.prod(x[:-1]) * ranks * N if needs[0] else 0
    return dx + _path_backward(x, u, A, B, A_general, needs, needs[0] or needs[1] or needs[3])


@register_flop_formula(_ops.linear)
def _linear(
    x: Shape,
    weight: Shape,
    bias: Shape | None,
    A: Shape,
    B: Shape,
    A_general: Shape | None,
    B_general: Shape | None,
    seed: Shape | None,
    scaling: float,
    dropout_p: float,
    own_gemm: bool,
    **kwargs: Any,
) -> int:
    product = 2 * math.prod(x[:-1]) * math.prod(weight)
    one_product = own_gemm and dropout_p == 0.0
    return product + (_merge(A, B, A_general) if one_product else _path(x, A, B, A_general))


@register_flop_formula(_ops.linear_backward)
def _linear_backward(
    grad: Shape,
    x: Shape,
    u: Shape,
    kept: Shape,
    weight: Shape,
    A: Shape,
    B: Shape,
    A_general: Shape | None,
    B_general: Shape | None,
    seed: Shape | None,
    scaling: float,
    dropout_p: float,
    own_gemm: bool,
    needs: list[bool],
    **kwargs: Any,
) -> int:
    T, (N, _, ranks) = math.prod(x[:-1]), _sizes(A, B, A_general)
    one_product = own_gemm and dropout_p == 0.0
    by_ranks = needs[0] and not one_product
    flops = _path_backward(x, u, A, B, A_general, needs, by_ranks or needs[1] or needs[3])
    if needs[0]:
        flops += 2 * T * math.prod(weight) + (_merge(A, B, A_general) if one_product else 2 * T * ranks * N)
    return flops


def _merge(A: Shape, B: Shape, A_general: Shape | None) -> int:
    N, M, _ = _sizes(A, B, A_general)
    return 2 * N * M * (A[2] // A[0] + (0 if A_general is None else A_general[0]))


@register_flop_formula(_ops.merge_coded)
def _merge_coded(weight: Shape, to: Shape, adapters: list[Any], *args: Any, **kwargs: Any) -> int:
    return sum(_merge(*adapters[i : i + 3]) for i in range(0, len(adapters), 4))


@register_flop_formula(_ops.merge_)
def _merge_into(weight: Shape, A: Shape, B: Shape, A_general: Shape | None, *args: Any, **kwargs: Any) -> int:
    return _merge(A, B, A_general)


@register_flop_formula(_ops.delta_weight)
def _delta_weight(A: Shape, B: Shape, A_general: Shape | None, *args: Any, **kwargs: Any) -> int:
    return _merge(A, B, A_general)
