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
from ptx.tensor_core import BYTES, LEAST_EXPONENT, multiply_add, tensor_core

from gralora_ext.selftest.instructions import CASES

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCE = CSRC / "cuda" / "conformance.cu"
MODELS = {80: "Ampere", 89: "Ada Lovelace", 90: "Hopper", 100: "Blackwell", 120: "RTX Blackwell"}
SHAPES = {"bf16": ("m16n8k16", 16), "f16": ("m16n8k16", 16), "tf32": ("m16n8k8", 8)}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}
SUMS = 16 * 8  # of one mma
RANDOM_MMA, MMA_AT_ONCE = 100_000, 2_000

toolkit = compilers.find_toolkit()
pytestmark = [
    pytest.mark.skipif(toolkit is None, reason="there are no CUDA headers"),
    pytest.mark.skipif(compilers.compiler() is None, reason="there is no C++ compiler"),
]


def operands(
    rng: np.random.Generator, kind: str, ptx_type: str, sums: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of A and of B^T, as their format holds them, and C."""
    K, dtype = SHAPES[ptx_type][1], DTYPES[ptx_type]
    least = LEAST_EXPONENT[ptx_type]

    def numbers(shape: tuple[int, ...], bits: int, of: torch.dtype, lowest: int) -> torch.Tensor:
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

    bits = {"bf16": 7, "f16": 10, "tf32": 10}[ptx_type]
    a, b = numbers((sums, K), bits, dtype, least), numbers((sums, K), bits, dtype, least)
    if ptx_type == "tf32":  # as registers hold them: the low bits are ignored
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    return a, b, numbers((sums,), 23, torch.float32, -126 if kind != "normal" else 0)


def model(capability: int, ptx_type: str) -> Any:
    sim = pytest.importorskip("mmasim.nv_ptx.sim")
    return sim.MMA(MODELS[capability], f"{SHAPES[ptx_type][0]}.f32.{ptx_type}.{ptx_type}.f32")


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


@pytest.mark.parametrize("kind", ["normal", "extreme", "subnormal"])
@pytest.mark.parametrize("ptx_type", SHAPES)
@pytest.mark.parametrize("capability", MODELS)
def test_both_add_as_the_models(library: Library, capability: int, ptx_type: str, kind: str) -> None:
    """100,000 random mma of each architecture, and some of each other kind of operands."""
    add = model(capability, ptx_type)
    library.device(capability)
    rng = np.random.default_rng(capability)
    for _ in range(RANDOM_MMA // MMA_AT_ONCE if (ptx_type, kind) == ("bf16", "normal") else 1):
        a, b, c = operands(rng, kind, ptx_type, MMA_AT_ONCE * SUMS)
        want = bits_of(add.dpa(a, b, c).numpy())
        arrays = a.double().numpy(), b.double().numpy(), c.numpy()
        interpreted = multiply_add(*arrays, ptx_type, tensor_core(capability))
        emulated = library.multiply_add(*arrays, BYTES[ptx_type], LEAST_EXPONENT[ptx_type])
        np.testing.assert_array_equal(bits_of(interpreted), want)
        np.testing.assert_array_equal(bits_of(emulated), want)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("ptx_type", SHAPES)
def test_infinities_and_nan_are_those_of_the_models(library: Library, ptx_type: str, capability: int) -> None:
    add = model(capability, ptx_type)
    library.device(capability)
    rng = np.random.default_rng(5)
    a, b, c = operands(rng, "normal", ptx_type, 4096)
    for tensor in (a, b, c):
        flat = tensor.view(-1)
        places = torch.from_numpy(rng.integers(0, flat.numel(), flat.numel() // 20))
        flat[places] = torch.tensor([torch.inf, -torch.inf, torch.nan])[places % 3].to(tensor.dtype)
    want = add.dpa(a, b, c).numpy()
    arrays = a.double().numpy(), b.double().numpy(), c.numpy()
    got = library.multiply_add(*arrays, BYTES[ptx_type], LEAST_EXPONENT[ptx_type])
    np.testing.assert_array_equal(bits_of(got), bits_of(want))
    np.testing.assert_array_equal(bits_of(multiply_add(*arrays, ptx_type, tensor_core(capability))), bits_of(want))


@pytest.mark.skipif(toolkit is not None and toolkit.nvcc is None, reason="there is no nvcc")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("ptx_type", SHAPES)
def test_emulator_and_interpreter_have_the_same_bits_in_a_kernel(
    library: Library, ptx_type: str, capability: int
) -> None:
    library.device(capability)
    name, case = f"mma_{ptx_type}", CASES[f"mma_{ptx_type}"]()
    exact, cut = ([array.copy() for array in case.arrays] for _ in range(2))
    library.launch(f"launch_{name}", *cut)
    library.truncate(False)
    library.launch(f"launch_{name}", *exact)
    gpu = Gpu(compilers.ptx(SOURCE, capability, include=[CSRC]), tensor_core(capability))
    arrays = [array.copy() for array in case.arrays]
    gpu.launch(name, (1,), (32,), [gpu.upload(array) for array in arrays], dynamic_bytes=32 * 16)
    np.testing.assert_array_equal(bits_of(cut[-1]), bits_of(arrays[-1]))
    assert (bits_of(cut[-1]) != bits_of(exact[-1])).any()  # cutting is seen
    case.check(cut)


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
                one = multiply_add(a[i][:, k], b[j][:, k], one, "bf16", core)
                stretch = multiply_add(a[i][:, k], b[j][:, k], stretch, "bf16", core)
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
