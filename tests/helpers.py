# SPDX-License-Identifier: Apache-2.0
"""What all tests of the operations share: the tolerance policy, random cases and the comparison with the reference.

Every case names its own seed, so that any test can be repeated alone; no test depends on the order of the others.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

import gralora_ext
from gralora_ext import reference
from gralora_ext.tolerances import TOLERANCES, tolerance

# Share of the weights that a 16-bit merge may round to the neighbour of the correctly rounded
# value: a float32 sum is about 2^-13 of a bfloat16 ulp off (2^-10 of a float16 ulp), and only sums
# that near to a tie can go the other way.
MERGE_MISROUNDED = 0.02

DTYPES = tuple(TOLERANCES)
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
LAYOUTS = (
    "contiguous",
    "offset",
    "row_slice",
    "column_stride",
    "transposed",
    "leading_permuted",
    "expanded_rows",
    "expanded_columns",
)
# (k, n, m, rb, h): single elements, one wide side, many blocks of one rank, ranks and widths beyond
# one panel
EXTREME_SIZES = [
    (1, 1, 1, 1, 0),
    (8, 1, 1, 1, 0),
    (1, 1, 300, 1, 1),
    (1, 300, 1, 1, 1),
    (32, 3, 2, 1, 0),
    (8, 129, 127, 9, 0),
    (2, 576, 768, 64, 130),
]


def make(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal values of deviation ``scale`` in ``dtype``, shaped ``shape`` and laid out in memory as ``layout`` says."""

    def values(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    *leading, columns = shape
    if layout == "offset":  # no vector load may rely on the alignment of the first element
        return values(math.prod(shape) + 1)[1:].view(shape)
    if layout == "row_slice":
        return values(*leading, columns + 5)[..., 2 : 2 + columns]
    if layout == "padded":  # pairs of columns are aligned where there is an even number of them
        return values(*leading, columns + 6)[..., 4 : 4 + columns]
    if layout == "column_stride":
        return values(*leading, 3 * columns)[..., ::3]
    if layout == "transposed":
        return values(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "leading_permuted":  # the leading dimensions cannot be viewed as one
        buffer = values(*(size + 1 for size in reversed(leading)), columns)
        inner = buffer[tuple(slice(1, None) for _ in leading)]
        return inner.permute(*reversed(range(len(leading))), len(leading))
    if layout == "expanded_rows":
        return values(*(1 for _ in leading), columns).expand(shape)
    if layout == "expanded_columns":
        return values(*leading, 1).expand(shape)
    return values(*shape)


@dataclass
class Inputs:
    """One call: the tensors by argument name (no general ones where h = 0), the gradient of y, and the scaling."""

    tensors: dict[str, Tensor]
    grad: Tensor
    scaling: float

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values on the CPU in ``dtype``."""
        wide = {name: t.detach().to("cpu", dtype) for name, t in self.tensors.items()}
        return Inputs(wide, self.grad.to("cpu", dtype), self.scaling)

    def squared(self) -> Inputs:
        """All factors squared: where :func:`value_and_gradients` sums terms, it then sums their squares."""
        return Inputs({name: t.square() for name, t in self.tensors.items()}, self.grad.square(), self.scaling**2)

    def adapter(self) -> dict[str, Tensor]:
        """The tensors that ``merge_`` and ``delta_weight`` take."""
        return {name: t for name, t in self.tensors.items() if name not in ("x", "base")}


@dataclass(frozen=True)
class Case:
    """The sizes, dtypes, layouts and seed of a random call; ``n = N/k`` and ``m = M/k`` are the widths of a block."""

    leading: tuple[int, ...] = (7,)
    k: int = 2
    n: int = 12
    m: int = 20
    rb: int = 3
    h: int = 0
    x_dtype: torch.dtype = torch.float32
    base_dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    x_layout: str = "contiguous"
    base_layout: str = "contiguous"
    adapter_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    scaling: float = 0.75
    seed: int = 0

    def inputs(self, device: torch.device | str = "cpu") -> Inputs:
        """The tensors of this case on ``device``, scaled so that the adapter's share of y is as large as base's."""
        generator = torch.Generator().manual_seed(self.seed)
        k, r = self.k, self.k * self.rb
        N, M = k * self.n, k * self.m
        shapes = {
            "x": ((*self.leading, N), self.x_layout, self.x_dtype, 1.0),
            "base": ((*self.leading, M), self.base_layout, self.base_dtype, 1.0),
            "A": ((k, self.n, r), self.adapter_layout, self.adapter_dtype, self.n**-0.5),
            "B": ((k, r, self.m), self.adapter_layout, self.adapter_dtype, r**-0.5),
        }
        if self.h:
            shapes["A_general"] = ((self.h, N), self.adapter_layout, self.adapter_dtype, N**-0.5)
            shapes["B_general"] = ((M, self.h), self.adapter_layout, self.adapter_dtype, self.h**-0.5)
        tensors = {
            name: make(shape, layout, dtype, generator, scale, device)
            for name, (shape, layout, dtype, scale) in shapes.items()
        }
        grad = make((*self.leading, M), self.grad_layout, self.base_dtype, generator, 0.125, device)
        return Inputs(tensors, grad, self.scaling)

    def uniform(self, dtype: torch.dtype) -> Case:
        """This case with all tensors in ``dtype``."""
        return replace(self, x_dtype=dtype, base_dtype=dtype, adapter_dtype=dtype)


def cases() -> st.SearchStrategy[Case]:
    """Every k up to 8, T from 0 to 300 in one to four dimensions, odd widths, all dtypes and layouts, h up to 9."""
    width = st.one_of(st.integers(1, 40), st.sampled_from([1, 15, 16, 17, 31, 33, 63, 64, 65, 97, 128, 131]))
    leading = st.one_of(
        st.just(()),
        st.tuples(st.one_of(st.integers(0, 300), st.sampled_from([0, 1, 64, 65, 300]))),
        st.tuples(st.integers(0, 6), st.integers(1, 50)),
        st.tuples(st.integers(1, 4), st.integers(0, 5), st.integers(1, 15)),
    )
    dtype, layout = st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)
    return st.builds(
        Case,
        leading=leading,
        k=st.integers(1, 8),
        n=width,
        m=width,
        rb=st.one_of(st.integers(1, 9), st.sampled_from([1, 2, 16, 17])),
        h=st.one_of(st.just(0), st.integers(1, 9)),
        x_dtype=dtype,
        base_dtype=dtype,
        adapter_dtype=dtype,
        x_layout=layout,
        base_layout=layout,
        adapter_layout=st.sampled_from(["contiguous", "offset", "row_slice", "column_stride", "transposed"]),
        grad_layout=layout,
        scaling=st.sampled_from([1.0, 0.75, -2.0, 4.0]),
        seed=st.integers(0, 2**31),
    )


def value_and_gradients(op: Callable[..., Tensor], inputs: Inputs, **options: object) -> dict[str, Tensor]:
    """``op``'s result as ``"y"`` and the gradient of each tensor argument under the argument's name."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    y = op(**leaves, scaling=inputs.scaling, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.grad)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def expected_results(
    inputs: Inputs, op: Callable[..., Tensor] = reference.gralora, **options: object
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's results in float64 from the same rounded inputs, and the size that each one's norm may count as.

    A result of few terms can cancel to almost nothing, and then no sum is near it in relation to its norm. The norm
    that counts is therefore at least that of the same sums with random signs, √(Σ terms²), which is the norm itself
    wherever nothing cancels.
    """
    wide = inputs.to(torch.float64)
    with threads(1):  # small products, which a second thread on a busy machine would only delay
        expected = value_and_gradients(op, wide, **options)
        squares = value_and_gradients(op, wide.squared(), **options)
    sizes = {name: torch.maximum(t.norm(), squares[name].sum().sqrt()) for name, t in expected.items()}
    return expected, sizes


def assert_near(
    name: str, actual: Tensor, expected: Tensor, size: Tensor | None = None, bound: float | None = None
) -> None:
    """``‖actual - expected‖ ≤ bound·size``, by default the table's for an output of the dtype and ``‖expected‖``."""
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if bound is None:
        bound = TOLERANCES[actual.dtype].of(actual, gradient=False)
    actual, expected = (t.detach().cpu() for t in (actual, expected))
    error = (actual.double() - expected.double()).norm()
    most = bound * (expected.double().norm() if size is None else size)
    assert error <= most, f"{name} ({NAMES[actual.dtype]}): error {error:.3e} exceeds {most:.3e}"


def assert_results_near(
    actual: dict[str, Tensor],
    inputs: Inputs,
    op: Callable[..., Tensor] = reference.gralora,
    like_y: str = "base",
    **options: object,
) -> dict[str, Tensor]:
    """y and every gradient in ``actual`` agree with ``op`` in float64 within the table, each in its tensor's dtype.

    ``like_y`` names the tensor whose dtype is y's. Returns what ``op`` gives.
    """
    expected, sizes = expected_results(inputs, op, **options)
    for name, result in actual.items():
        owner = inputs.tensors[like_y if name == "y" else name]
        assert result.dtype == owner.dtype, f"{name}: dtype {result.dtype}, expected {owner.dtype}"
        bound = tolerance(result, (t.dtype for t in inputs.tensors.values()), gradient=name != "y")
        assert_near(name, result, expected[name], sizes[name], bound)
    return expected


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit (so NaN equals itself, and 0.0 differs from -0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.flatten().clone(memory_format=torch.contiguous_format) for t in (a, b))  # one element may have any stride
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def run_python(code: str, timeout: float = 120, **environment: str) -> str:
    """What ``code`` prints in a fresh interpreter that finds this ``gralora_ext`` and these helpers."""
    package = Path(gralora_ext.reference.__file__).resolve().parents[1]
    paths = [str(Path(__file__).resolve().parent), str(package), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
