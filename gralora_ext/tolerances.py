"""How far a result may be from the reference: one table for the tests and the self-test."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """The largest allowed ``‖actual - expected‖ / ‖expected‖`` of a result, and why it is what it is."""

    output: float
    reason: str


# Keyed by the dtype of the result: whatever the inputs' dtypes are, a result is rounded to its own dtype once.
TOLERANCES = {
    torch.float64: Tolerance(1e-13, "float64 sums: 1.1e-16 a term, over chains of a few thousand terms"),
    torch.float32: Tolerance(3e-6, "float32 sums: 6e-8 a term, over the same chains summed in blocks"),
    torch.float16: Tolerance(1e-3, "float32 sums, then one rounding of at most half an ulp: 4.9e-4"),
    torch.bfloat16: Tolerance(
        6e-3, "float32 sums, then one rounding of at most half an ulp: 3.9e-3, or two: 2.3e-3 in norm"
    ),
}
# A gradient passes three products where the output passes two, and sums over T besides.
GRADIENT_FACTOR = 4
