# SPDX-License-Identifier: Apache-2.0
"""What each instruction that the CUDA kernels use must give, computed from the figures of NVIDIA's PTX ISA.

The kernels are those of ``csrc/cuda/conformance.cu``, each for one warp. All results must be right to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LANES = np.arange(32)
Launch = Callable[[str, list[np.ndarray]], list[np.ndarray]]


@dataclass
class Case:
    """Arrays as the kernel takes them: the last ``outputs`` are written; and what they then hold."""

    arrays: list[np.ndarray]
    expected: list[np.ndarray]

    def check(self, arrays: list[np.ndarray]) -> None:
        """Raises AssertionError where an output is not as expected, under ``python -O`` too."""
        for got, want in zip(arrays[-len(self.expected) :], self.expected, strict=True):
            if got.tobytes() != want.tobytes():
                raise AssertionError


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Of values that are bf16 already."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def multiples(rng: np.random.Generator, *shape: int, of: float, most: float) -> np.ndarray:
    """Multiples of ``of`` from -most to most"""
    count = round(most / of)
    return rng.integers(-count, count + 1, shape) * of


def mma_bf16() -> Case:
    """m16n8k16: A's elements 0, 1, 4, 5 of a lane are in row g, the others in g + 8; those from 4 on in columns + 8.

    Tensor cores cut terms at 24 bits or more below the largest one, and sums to the 24 bits of a float32: which of them are cut
    differs among devices. Here each term and each sum is a multiple of 2^-18 below 2^6, and nothing is cut on any of them.
    """
    rng = np.random.default_rng(1)
    A, B = multiples(rng, 16, 16, of=2**-6, most=2), multiples(rng, 16, 8, of=2**-6, most=1)
    C = multiples(rng, 16, 8, of=2**-18, most=16)
    D = C + A @ B
    a, b = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    c, d = np.zeros((32, 4), np.float32), np.zeros((32, 4), np.float32)
    for lane in range(32):
        group, member = lane // 4, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            column = member * 2 + i % 2 + (8 if i >= 4 else 0)
            a[lane, i] = bf16_bits(A[row, column])
        for i in range(4):
            b[lane, i] = bf16_bits(B[member * 2 + i % 2 + (8 if i >= 2 else 0), group])
            place = group + (8 if i >= 2 else 0), member * 2 + i % 2
            c[lane, i], d[lane, i] = C[place], D[place]
    return Case([a.view(np.uint32), b.view(np.uint32), c], [d])


def ldmatrix(transposed: bool) -> Case:
    rng = np.random.default_rng(3)
    x = rng.integers(0, 1 << 16, (32, 8)).astype(np.uint16)
    rows = rng.permutation(32).astype(np.int32)
    result = np.zeros((32, 4), np.uint32)
    for matrix in range(4):
        elements = x[rows[8 * matrix : 8 * matrix + 8]].astype(np.uint32)
        if transposed:
            elements = elements.T
        for lane in range(32):
            low, high = elements[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            result[lane, matrix] = low | high << 16
    return Case([x, rows, np.zeros_like(result)], [result])


def cp_async() -> Case:
    rng = np.random.default_rng(4)
    x = rng.integers(1, 256, (32, 16)).astype(np.uint8)
    valid = rng.permutation(LANES % 17).astype(np.int32)
    kept = np.where(np.arange(16) < valid[:, None], x, 0).astype(np.uint8)
    return Case([x, valid, np.full_like(x, 7)], [kept[::-1].copy()])


def accesses() -> Case:
    rng = np.random.default_rng(7)
    inputs = [rng.integers(0, 256, (32, size)).astype(np.uint8) for size in (2, 4, 8, 16)]
    swapped = [x[LANES ^ 1] for x in inputs]
    return Case([*inputs, *(np.zeros_like(x) for x in inputs)], swapped)


CASES: dict[str, Callable[[], Case]] = {
    "mma_bf16": mma_bf16,
    "ldmatrix": lambda: ldmatrix(False),
    "ldmatrix_trans": lambda: ldmatrix(True),
    "cp_async": cp_async,
    "accesses": accesses,
}


def wrong_ones(launch: Launch) -> list[str]:
    """The names of the instructions whose results are wrong; ``launch(name, arrays)`` gives back the arrays."""
    wrong = []
    for name, make in CASES.items():
        case = make()
        try:
            case.check(launch(name, case.arrays))
        except AssertionError:
            wrong.append(name)
    return wrong
