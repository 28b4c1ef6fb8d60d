# SPDX-License-Identifier: Apache-2.0
"""What each instruction that the CUDA kernels may use must give, computed from the figures of NVIDIA's PTX ISA.

The kernels are those of ``csrc/cuda/conformance.cu``, each for one warp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LANES = np.arange(32)
# The sums of an mma are in double here and in the emulator, in another order, and rounded once to
# fp32.
MMA_TOLERANCE = 1e-6


@dataclass
class Case:
    """Arrays as the kernel takes them: the last ``outputs`` are written; and what they then hold."""

    arrays: list[np.ndarray]
    expected: list[np.ndarray]
    tolerance: float = 0.0

    def check(self, arrays: list[np.ndarray]) -> None:
        """Raises AssertionError where an output is not as expected, under ``python -O`` too."""
        for got, want in zip(arrays[-len(self.expected) :], self.expected, strict=True):
            if self.tolerance > 0:
                np.testing.assert_allclose(got, want, rtol=0, atol=self.tolerance)
            elif got.tobytes() != want.tobytes():
                raise AssertionError("the bits differ")


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Of values that are bf16 already."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def f16_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint16)


def small_numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Multiples of 1/64 from -2 to 2: exact in bf16, fp16 and tf32."""
    return rng.integers(-128, 129, shape) / 64


def c_place(lane: int, i: int) -> tuple[int, int]:
    """m16n8: row and column of register i."""
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


def mma_16(bits: Callable[[np.ndarray], np.ndarray]) -> Case:
    """m16n8k16: A's elements 0, 1, 4, 5 of a lane are in row g, the others in g + 8; those from 4 on in columns + 8."""
    rng = np.random.default_rng(1)
    A, B, C = small_numbers(rng, 16, 16), small_numbers(rng, 16, 8), rng.standard_normal((16, 8)).astype(np.float32)
    a, b = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    for lane in range(32):
        group, member = lane // 4, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            column = member * 2 + i % 2 + (8 if i >= 4 else 0)
            a[lane, i] = bits(A[row, column])
        for i in range(4):
            b[lane, i] = bits(B[member * 2 + i % 2 + (8 if i >= 2 else 0), group])
    return with_sums(a.view(np.uint32), b.view(np.uint32), A, B, C)


def mma_tf32() -> Case:
    """m16n8k8: A's registers 0 and 2 are in row g, 1 and 3 in g + 8; 2 and 3 in columns + 4. Low bits are ignored."""
    rng = np.random.default_rng(2)
    A, B, C = small_numbers(rng, 16, 8), small_numbers(rng, 8, 8), rng.standard_normal((16, 8)).astype(np.float32)
    a, b = np.zeros((32, 4), np.float32), np.zeros((32, 2), np.float32)
    for lane in range(32):
        group, member = lane // 4, lane % 4
        for i in range(4):
            a[lane, i] = A[group if i in (0, 2) else group + 8, member + (4 if i >= 2 else 0)]
        for i in range(2):
            b[lane, i] = B[member + 4 * i, group]
    dropped = np.uint32(0x1FFF)
    return with_sums(a.view(np.uint32) | dropped, b.view(np.uint32) | dropped, A, B, C)


def with_sums(a: np.ndarray, b: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray) -> Case:
    D = C + A @ B
    places = [[c_place(lane, i) for i in range(4)] for lane in range(32)]
    c = np.array([[C[place] for place in row] for row in places], np.float32)
    d = np.array([[D[place] for place in row] for row in places], np.float32)
    return Case([a, b, c], [d], MMA_TOLERANCE)


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


def shfl_xor() -> Case:
    x = np.random.default_rng(5).standard_normal(32).astype(np.float32)
    result = np.stack([x[LANES ^ (1 << i)] for i in range(5)])
    return Case([x, np.zeros_like(result)], [result])


def to_tf32() -> Case:
    """Random numbers, ties of both signs, next to ties, subnormal numbers, the largest, infinities, NaN."""
    bits = np.random.default_rng(6).integers(0, 1 << 32, 32, np.uint64).astype(np.uint32)
    bits[(bits >> 23 & 255) == 255] = 0
    bits[:12] = [
        *(0x3F801000, 0xBF803000, 0x3F800FFF, 0x3F801001, 0x00000FFF, 0x00001000),
        *(0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x80000000),
    ]
    step = 1 << 13
    expected = np.zeros(32, np.uint32)
    for i, value in enumerate(int(b) for b in bits):
        magnitude, sign = value & 0x7FFFFFFF, value & 0x80000000
        if magnitude > 0x7F800000:
            expected[i] = 0x7FFFFFFF
        elif magnitude == 0x7F800000:
            expected[i] = value
        else:
            expected[i] = sign | (magnitude + step // 2) // step * step
    return Case([bits.view(np.float32), np.zeros(32, np.uint32)], [expected])


def accesses() -> Case:
    rng = np.random.default_rng(7)
    inputs = [rng.integers(0, 256, (32, size)).astype(np.uint8) for size in (2, 4, 8, 16)]
    swapped = [x[LANES ^ 1] for x in inputs]
    return Case([*inputs, *(np.zeros_like(x) for x in inputs)], swapped)


def plain_cuda() -> Case:
    x = np.random.default_rng(8).integers(-1000, 1000, 32).astype(np.int32)
    shifted = x[np.where(LANES + 3 < 32, LANES + 3, LANES)] - x[3]
    ballot = sum(1 << lane for lane in range(32) if x[lane] % 3 == 0)
    sums = np.array([5 + x.sum()], np.int32), np.array([0.5 + x.sum()], np.float32)
    start = np.array([5], np.int32), np.array([0.5], np.float32)
    return Case(
        [x, np.zeros_like(x), np.zeros(32, np.uint32), *start], [shifted, np.full(32, ballot, np.uint32), *sums]
    )


CASES: dict[str, Callable[[], Case]] = {
    "mma_bf16": lambda: mma_16(bf16_bits),
    "mma_f16": lambda: mma_16(f16_bits),
    "mma_tf32": mma_tf32,
    "ldmatrix": lambda: ldmatrix(False),
    "ldmatrix_trans": lambda: ldmatrix(True),
    "cp_async": cp_async,
    "shfl_xor": shfl_xor,
    "to_tf32": to_tf32,
    "accesses": accesses,
    "plain_cuda": plain_cuda,
}
