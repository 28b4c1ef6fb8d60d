# SPDX-License-Identifier: Apache-2.0
"""How tensor cores add products of bf16 to float32, written apart from emulator/tensor_core.h, which has the source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TensorCore:
    fraction_bits: int  # that are kept below the largest exponent of a block
    terms: int  # that are added at once


AMPERE = TensorCore(24, 8)  # 8.0 to 8.9
HOPPER = TensorCore(25, 16)  # 9.0 and later
LEAST_EXPONENT = -126  # of the normal numbers of float32, and of bf16


def tensor_core(capability: int) -> TensorCore:
    return HOPPER if capability >= 90 else AMPERE


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray, core: TensorCore) -> np.ndarray:
    """``c + sum_i a_i b_i`` over the last dimension of a and b (float64), one block of terms after the other; c: float32."""
    for first in range(0, a.shape[-1], core.terms):
        block = slice(first, first + core.terms)
        c = _add_block(a[..., block], b[..., block], c, core.fraction_bits)
    return c


def _add_block(a: np.ndarray, b: np.ndarray, c: np.ndarray, fraction_bits: int) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        terms = np.concatenate([a * b, c.astype(np.float64)[..., None]], axis=-1)
        exponents = np.concatenate([_exponents(a) + _exponents(b), _exponents(c)[..., None]], axis=-1)
        exponents = np.where(terms == 0, -108 - fraction_bits, np.where(np.isfinite(terms), exponents, -(2**20)))
        most = exponents.max(axis=-1)
        shift = fraction_bits - most
        finite = np.isfinite(terms).all(axis=-1)
        aligned = np.trunc(np.ldexp(np.where(finite[..., None], terms, 0.0), shift[..., None]))
        cut = _cut_to_float(np.ldexp(aligned.sum(axis=-1), -shift))
        plain = terms.sum(axis=-1).astype(np.float32)
        plain[np.isnan(plain)] = np.uint32(0x7FFFFFFF).view(np.float32)
        return np.where(finite, cut, plain)


def _exponents(x: np.ndarray) -> np.ndarray:
    """Of numbers as their format has them: those of subnormal ones are the least of the normal ones."""
    return np.maximum(np.frexp(x.astype(np.float64))[1] - 1, LEAST_EXPONENT)


def _cut_to_float(x: np.ndarray) -> np.ndarray:
    exponents = _exponents(x)
    return np.ldexp(np.trunc(np.ldexp(x, 23 - exponents)), exponents - 23).astype(np.float32) + np.float32(0)
