# SPDX-License-Identifier: Apache-2.0
"""How tensor cores add: the emulator and the PTX interpreter do it bit for bit as models that were compared with the cards.

The models are those of mmasim (arXiv 2511.10909), of all architectures from 8.0 on that kernels are built for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compilers
import numpy as np
import pytest
import torch
from emulated import Library
from ptx import Gpu
from ptx.tensor_core import LEAST_EXPONENT, multiply_add, tensor_core

from gralora_ext.selftest.instructions import mma_bf16

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCE = CSRC / "cuda" / "conformance.cu"
MODELS = {80: "Ampere", 89: "Ada Lovelace", 90: "Hopper", 100: "Blackwell", 120: "RTX Blackwell"}
TERMS, SUMS = 16, 16 * 8  # of one mma
MMA_AT_ONCE = 2_000
KINDS = [
    ("normal", 3 * MMA_AT_ONCE),
    pytest.param("normal", 100_000, marks=pytest.mark.exhaustive),
    ("extreme", MMA_AT_ONCE),
    ("subnormal", MMA_AT_ONCE),
]

toolkit = compilers.find_toolkit()
pytestmark = [
    pytest.mark.skipif(toolkit is None, reason="there are no CUDA headers"),
    pytest.mark.skipif(compilers.compiler() is None, reason="there is no C++ compiler"),
]


def operands(rng: np.random.Generator, kind: str, sums: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of A and of B^T in bf16, and C."""

    def numbers(shape: tuple[int, ...], bits: int, of: torch.dtype, lowest: int = LEAST_EXPONENT) -> torch.Tensor:
        """Of the exponents that the kind asks for, with zeros among them."""
        mantissas = rng.standard_normal(shape)
        if kind == "normal":
            exponents = np.zeros(shape, np.int64)
        elif kind == "extreme":
            exponents = rng.integers(lowest, -lowest, shape)
        else:  # about the subnormal numbers, whose products vanish, beside large ones
            exponents = np.where(rng.random(shape) < 0.5, rng.integers(lowest - bits, lowest + 2, shape), -lowest // 2)
        values = np.ldexp(mantissas, exponents) * (rng.random(shape) < 0.9)
        return torch.from_numpy(values).to(of)

    a, b = (numbers((sums, TERMS), 7, torch.bfloat16) for _ in range(2))
    return a, b, numbers((sums,), 23, torch.float32, LEAST_EXPONENT if kind != "normal" else 0)


def model(capability: int) -> Any:
    sim = pytest.importorskip("mmasim.nv_ptx.sim")
    return sim.MMA(MODELS[capability], "m16n8k16.f32.bf16.bf16.f32")


def bits_of(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


@pytest.fixture(scope="module")
def loaded() -> Library:
    return Library(compilers.emulated_library(SOURCE, include=[CSRC]))


@pytest.fixture
def library(loaded: Library) -> Iterator[Library]:
    loaded.truncate(True)
    yield loaded
    loaded.truncate(False)
    loaded.device()


@pytest.mark.parametrize(("kind", "count"), KINDS)
@pytest.mark.parametrize("capability", MODELS)
def test_both_add_as_the_models(library: Library, capability: int, kind: str, count: int) -> None:
    add = model(capability)
    library.device(capability)
    rng = np.random.default_rng(capability)
    for _ in range(count // MMA_AT_ONCE):
        a, b, c = operands(rng, kind, MMA_AT_ONCE * SUMS)
        want = bits_of(add.dpa(a, b, c).numpy())
        arrays = a.double().numpy(), b.double().numpy(), c.numpy()
        np.testing.assert_array_equal(bits_of(multiply_add(*arrays, tensor_core(capability))), want)
        np.testing.assert_array_equal(bits_of(library.multiply_add(*arrays)), want)


@pytest.mark.parametrize("capability", [80, 90])
def test_infinities_and_nan_are_those_of_the_models(library: Library, capability: int) -> None:
    add = model(capability)
    library.device(capability)
    rng = np.random.default_rng(5)
    a, b, c = operands(rng, "normal", 4096)
    for tensor in (a, b, c):
        flat = tensor.view(-1)
        places = torch.from_numpy(rng.integers(0, flat.numel(), flat.numel() // 20))
        flat[places] = torch.tensor([torch.inf, -torch.inf, torch.nan])[places % 3].to(tensor.dtype)
    want = add.dpa(a, b, c).numpy()
    arrays = a.double().numpy(), b.double().numpy(), c.numpy()
    np.testing.assert_array_equal(bits_of(library.multiply_add(*arrays)), bits_of(want))
    np.testing.assert_array_equal(bits_of(multiply_add(*arrays, tensor_core(capability))), bits_of(want))


@pytest.mark.skipif(toolkit is not None and toolkit.nvcc is None, reason="there is no nvcc")
@pytest.mark.parametrize("capability", [80, 90])
def test_emulator_and_interpreter_have_the_same_bits_in_a_kernel(library: Library, capability: int) -> None:
    library.device(capability)
    a, b, _ = mma_bf16().arrays
    c = np.random.default_rng(2).standard_normal((32, 4)).astype(np.float32)
    exact, cut = ([a, b, c.copy()] for _ in range(2))
    library.launch("launch_mma_bf16", *cut)
    library.truncate(False)
    library.launch("launch_mma_bf16", *exact)
    gpu = Gpu(compilers.ptx(SOURCE, capability, include=[CSRC]), tensor_core=tensor_core(capability))
    arrays = [array.copy() for array in (a, b, c)]
    gpu.launch("mma_bf16", (1,), (32,), [gpu.upload(array) for array in arrays])
    np.testing.assert_array_equal(bits_of(cut[-1]), bits_of(arrays[-1]))
    assert (bits_of(cut[-1]) != bits_of(exact[-1])).any()  # cutting is seen


@pytest.mark.parametrize("capability", [80, 90])
def test_a_long_sum_drifts_towards_zero_and_one_in_stretches_does_not(capability: int) -> None:
    """28,672 terms in three pieces, as the kernels take float32: what the documents say of tensor cores."""
    K, sums, core = 28_672, 64, tensor_core(capability)
    rng = np.random.default_rng(3)
    a, b = (pieces_of(rng.standard_normal((sums, K)).astype(np.float32)) for _ in range(2))
    exact = (sum(a) * sum(b)).sum(axis=1)
    one = np.zeros(sums, np.float32)
    total = np.zeros(sums, np.float32)
    for first in range(0, K, 32):
        stretch = np.zeros(sums, np.float32)
        for k in (slice(first, first + 16), slice(first + 16, first + 32)):
            for i, j in ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)):
                one = multiply_add(a[i][:, k], b[j][:, k], one, core)
                stretch = multiply_add(a[i][:, k], b[j][:, k], stretch, core)
        total += stretch
    assert 5e-5 < relative_error(one, exact) < 5e-4
    assert relative_error(total, exact) < 2e-6
    assert (np.abs(one) < np.abs(exact)).mean() > 0.75  # most of them


def pieces_of(x: np.ndarray) -> list[np.ndarray]:
    """A float32 as three bf16, in float64."""
    pieces = []
    rest = torch.from_numpy(x)
    for _ in range(3):
        pieces.append(rest.bfloat16().double().numpy())
        rest = rest - rest.bfloat16().float()
    return pieces


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
