# SPDX-License-Identifier: Apache-2.0
"""A merge into a part of a weight, with the bits that a merge into the whole weight has there.

Each weight gets ``s Σ_q A[n,i,j·rb+q] B[j,n·rb+q,o] (+ s Bg Ag)``, one sum that no other weight has a part in: so where a rectangle
of the weight lies in block (n, j), that is the merge of a GraLoRA with k = 1 whose A and B are cut to the rectangle and to the
block's ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .._loader import load

_native = load()  # without gralora_ext.ops, which tells torch's compiler of the operations: seconds, for nothing here


def merge_strip_(
    strip: Tensor, row: int, column: int, weights: dict[str, Tensor], scaling: float, fan_in_fan_out: bool
) -> None:
    """Adds an adapter to ``strip``, the rectangle of a weight that begins at ``row`` and ``column``, in place.

    Args:
        strip: 2-D; rows are out_features, or in_features with ``fan_in_fan_out``, where it must have more than one column
            unless the weight has one: by the strides the kernel chooses which factor it scales.
        weights: A, B, and where there are some A_general and B_general, as :func:`gralora_ext.ops.merge_` takes them.
        scaling, fan_in_fan_out: as there.
    """
    A, B = weights["A"], weights["B"]
    rb = A.shape[2] // A.shape[0]
    in_size, out_size = A.shape[1], B.shape[2]
    row_size, column_size = (in_size, out_size) if fan_in_fan_out else (out_size, in_size)
    for a, top, bottom in _cut(row, strip.shape[0], row_size):
        for b, left, right in _cut(column, strip.shape[1], column_size):
            if fan_in_fan_out:
                n, (i0, i1), j, (o0, o1) = a, (top, bottom), b, (left, right)
            else:
                n, (i0, i1), j, (o0, o1) = b, (left, right), a, (top, bottom)
            A_general, B_general = weights.get("A_general"), weights.get("B_general")
            _native.merge_into(
                strip[top - row : bottom - row, left - column : right - column],
                A[n : n + 1, i0 - n * in_size : i1 - n * in_size, j * rb : (j + 1) * rb],
                B[j : j + 1, n * rb : (n + 1) * rb, o0 - j * out_size : o1 - j * out_size],
                None if A_general is None else A_general[:, i0:i1],
                None if B_general is None else B_general[o0:o1],
                scaling,
                fan_in_fan_out,
            )


def _cut(begin: int, count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """The blocks of ``size`` that ``count`` positions from ``begin`` on reach into: which block, and from where to where."""
    at = begin
    while at < begin + count:
        end = min((at // size + 1) * size, begin + count)
        yield at // size, at, end
        at = end
