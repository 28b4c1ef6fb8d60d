# SPDX-License-Identifier: Apache-2.0
"""How far a result may be from the reference: one table for the tests and the self-test.

Each bound is at most about twice the greatest error of a right result that was measured, over the cases of the tests and some
thousand random ones, with the kernels of every instruction set. Errors are relative and in norm, ``‖actual - expected‖ / ‖expected‖``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

# Below so many elements, a few roundings in one direction are an error of their own size; from
# there on they average out.
MANY = 128


class Tolerance(NamedTuple):
    """The greatest allowed error of y, ΔW or a merged weight, and of a gradient, of at least ``MANY`` elements; of a result of
    fewer; and why they are what they are."""

    output: float
    gradient: float
    few: float
    reason: str

    def of(self, result: torch.Tensor, gradient: bool) -> float:
        """The bound for ``result``."""
        return self.few if result.numel() < MANY else self.gradient if gradient else self.output


# By the dtype of the result: whatever the inputs' dtypes are, sums are in float64 where one of them
# is, else in float32, and a result is rounded to its own dtype once.
TOLERANCES = {
    torch.float64: Tolerance(
        2e-15,
        8e-15,
        8e-15,
        "float64 sums, 1.1e-16 a term: terms of random signs give at most 1.1e-15; a gradient sums over tokens too, where "
        "hundreds of equal terms, each rounded in one direction, give 5e-15",
    ),
    torch.float32: Tolerance(
        7e-7, 2.5e-6, 2.5e-6, "float32 sums, 6e-8 a term: as in float64, at most 3.7e-7 and 1.3e-6"
    ),
    torch.float16: Tolerance(
        5e-4,
        5e-4,
        8e-4,
        "one rounding, of half an ulp or 4.9e-4 at most and 2.1e-4 in norm; two where torch's GEMM has rounded base before: "
        "at most 4.0e-4 in norm, and 9.8e-4 of a single element, where 4.1e-4 was met",
    ),
    torch.bfloat16: Tolerance(
        4e-3,
        4e-3,
        6e-3,
        "one rounding, of half an ulp or 3.9e-3 at most and 1.7e-3 in norm; two where torch's GEMM has rounded base before: "
        "at most 2.9e-3 in norm, and 7.8e-3 of a single element, where 3.9e-3 was met",
    ),
}
# Where x, base and the adapter are all bfloat16 (csrc/cpu/product_pairs.h).
ROUNDED_RANKS = Tolerance(
    5e-3,
    5e-3,
    8e-3,
    "the ranks U and dH are rounded to bfloat16 as factors, then the result is: two roundings, 2.3e-3 in norm, 3.4e-3 where "
    "there are few ranks, and at most 7.8e-3 where there is one, of which 6.0e-3 was met",
)


def tolerance(result: torch.Tensor, inputs: Iterable[torch.dtype], gradient: bool = False) -> float:
    """The bound for ``result``, of tensors (x, base, the adapter's) of the dtypes ``inputs``."""
    row = ROUNDED_RANKS if set(inputs) == {torch.bfloat16} else TOLERANCES[result.dtype]
    return row.of(result, gradient)
