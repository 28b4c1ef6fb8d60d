# SPDX-License-Identifier: Apache-2.0
"""The ranks of A and B by block.

Block (n, j) has the ranks j·rb to (j+1)·rb of ``A[n]`` and n·rb to (n+1)·rb of ``B[j]``.
"""

from __future__ import annotations

from torch import Tensor, nn


def split_A(A: Tensor) -> Tensor:
    """``[k, N/k, r]`` as ``[n, N/k, j, rb]``, a view."""
    return A.unflatten(2, (A.shape[0], -1))


def split_B(B: Tensor) -> Tensor:
    """``[k, r, M/k]`` as ``[j, n, rb, M/k]``, a view."""
    return B.unflatten(1, (B.shape[0], -1))


def padded_A(A: Tensor, r: int) -> Tensor:
    """A with zeros behind the ranks of each block, so that it has r in all."""
    split = split_A(A)
    return nn.functional.pad(split, (0, r // A.shape[0] - split.shape[3])).flatten(2, 3)


def padded_B(B: Tensor, r: int) -> Tensor:
    """B with zeros behind the ranks of each block, so that it has r in all."""
    split = split_B(B)
    return nn.functional.pad(split, (0, 0, 0, r // B.shape[0] - split.shape[2])).flatten(1, 2)
