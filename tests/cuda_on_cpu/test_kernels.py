"""The CUDA kernels, executed on the CPU from the same source, against ``gralora_ext/reference.py`` in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from compilers import compiler, emulated_library, emulated_program, find_toolkit, run
from emulated import Library
from helpers import Case, Inputs, assert_near, assert_results_near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gralora_ext import reference

pytestmark = pytest.mark.skipif(find_toolkit() is None or compiler() is None, reason="needs CUDA's headers and g++")
HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(emulated_library(HERE / "kernels.cu", include=[CSRC]))


class Call(ctypes.Structure):
    """The struct of the same name in kernels.cu."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("T", "N", "M", "k", "r", "h", "x_dtype", "adapter_dtype")),
        *((name, ctypes.c_int64) for name in ("column_splits", "token_splits", "seed")),
        *((name, ctypes.c_double) for name in ("scaling", "dropout")),
    ]


@dataclass(frozen=True)
class Splits:
    """Into how many parts columns and tokens are cut, and the dropout of the call."""

    columns: int = 1
    tokens: int = 1
    dropout: float = 0.0
    seed: int = 123_456_789_012


def bytes_of(tensor: Tensor | None) -> np.ndarray:
    return np.empty(0, np.uint8) if tensor is None or tensor.numel() == 0 else tensor.view(torch.uint8).numpy()


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel must write: NaN everywhere."""
    return torch.full(size, float("nan"), dtype=dtype)


def results(library: Library, inputs: Inputs, splits: Splits) -> dict[str, Tensor]:
    """y and all gradients as the kernels compute them; each launch may touch its own buffers alone."""
    t = {name: tensor.contiguous() for name, tensor in inputs.tensors.items()}
    x, base, A, B = (t[name] for name in ("x", "base", "A", "B"))
    general = [t.get("A_general"), t.get("B_general")]
    k, r, h = A.shape[0], A.shape[2], 0 if general[0] is None else general[0].shape[0]
    N, M = x.shape[-1], base.shape[-1]
    T = x.numel() // N
    call = Call(
        *(T, N, M, k, r, h, DTYPES.index(x.dtype), DTYPES.index(A.dtype)),
        *(splits.columns, splits.tokens, splits.seed, inputs.scaling, splits.dropout),
    )
    y, u, dx = torch.full_like(base, float("nan")), empty(T, k * r + h), torch.full_like(x, float("nan"))
    partial, dH = empty(splits.columns * T * k * (r + h)), empty(T, k * r + h)
    sums = empty(splits.tokens * (r + h) * (N + M))
    gradients = [None if p is None else torch.full_like(p, float("nan")) for p in (A, B, *general)]
    grad = inputs.grad.contiguous()

    def launch(name: str, **tensors: Tensor | None) -> None:
        library.clear()
        arrays = {key: bytes_of(tensor) for key, tensor in tensors.items()}
        library.register(**{key: array for key, array in arrays.items() if array.size})
        seed = np.frombuffer(call, np.uint8)
        library.register(call=seed)
        library.launch(name, ctypes.byref(call), *arrays.values())

    adapter = {"A": A, "B": B, "A_general": general[0], "B_general": general[1]}
    launch("test_forward", x=x, base=base, y=y, **adapter, u=u, partial=partial)
    assert library.launches() == ["project", "expand"][: 2 * (T > 0)]
    written = dict(zip(("dA", "dB", "dA_general", "dB_general"), gradients, strict=True))
    launch("test_backward", x=x, grad_y=grad, u=u, **adapter, dx=dx, **written, partial=partial, dH=dH, sums=sums)
    assert library.launches() == ["project", "expand", "weight_gradient", "reduce"][2 * (T == 0) :]
    named = zip(("x", "A", "B", "A_general", "B_general"), (dx, *gradients), strict=True)
    return {"y": y, **{name: gradient for name, gradient in named if gradient is not None}}


def check(library: Library, case: Case, splits: Splits) -> None:
    inputs = case.inputs()
    options = {"dropout_p": splits.dropout, "seed": torch.tensor([splits.seed])} if splits.dropout else {}
    assert_results_near(results(library, inputs, splits), inputs, **options)


def check_merge(library: Library, case: Case, dtype: torch.dtype) -> None:
    """The merged weight, read and written once."""
    inputs = case.inputs()
    k, N, M = case.k, case.k * case.n, case.k * case.m
    adapter = {name: tensor.contiguous() for name, tensor in inputs.adapter().items()}
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = {name: tensor.double() for name, tensor in adapter.items()}
    expected = weight.double() + reference.delta_weight(**wide, scaling=inputs.scaling)
    call = Call(
        *(0, N, M, k, k * case.rb, case.h, DTYPES.index(dtype), DTYPES.index(case.adapter_dtype)),
        *(1, 1, 0, inputs.scaling, 0.0),
    )
    library.clear()
    arrays = {
        "weight": bytes_of(weight),
        **{name: bytes_of(adapter.get(name)) for name in ("A", "B", "A_general", "B_general")},
    }
    library.register(**arrays)
    library.launch("test_merge", ctypes.byref(call), *arrays.values())
    assert library.launches() == ["merge"]
    assert_near("weight", weight, expected)
    size = weight.numel() * weight.element_size()
    assert library.traffic("weight") == (size, size)


def check_infinity(library: Library) -> None:
    """An infinity in one token's x spoils the rows of that token, and no others."""
    inputs = Case((131,), 2, 72, 88, 6).inputs()
    expected = results(library, inputs, Splits())
    inputs.tensors["x"][0, 0] = float("inf")
    actual = results(library, inputs, Splits())
    assert not actual["y"][0].isfinite().any()
    for name in ("y", "x"):
        assert torch.equal(actual[name][1:], expected[name][1:])


def check_mask(library: Library) -> None:
    """Which elements are kept, at indices beyond 32 bits too, in groups of 8 that do not begin at a multiple of 8."""
    count, width, seed, threshold = 500, 4099, -987_654_321_012, 20000
    for t, column in [(0, 0), (3, 5), (1_100_000, 17), (2**41, 8)]:
        first = t * width + column
        elements = torch.arange(first, first + 8 * count)
        words = reference.philox_4x32_10(seed, torch.arange(first // 8, first // 8 + count + 1))
        draws = torch.stack([words & 0xFFFF, words >> 16], -1).flatten()
        expected = draws[elements - first // 8 * 8] >= threshold
        kept = np.zeros(count, np.uint8)
        library.clear()
        seeds = np.array([seed])
        library.register(seed=seeds, kept=kept)
        at = (ctypes.c_int64(value) for value in (threshold, width, t, column))
        library.launch("test_mask", seeds, *at, kept, count)
        np.testing.assert_array_equal(np.unpackbits(kept, bitorder="little"), expected.numpy())


@pytest.mark.parametrize("splits", [Splits(), Splits(3, 2, 0.3)], ids=["", "split_dropout"])
@pytest.mark.parametrize("h", [0, 5], ids=["", "hybrid"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "_".join(str(d)[6:] for d in p))
def test_forward_and_backward(
    dtypes: tuple[torch.dtype, torch.dtype], k: int, h: int, splits: Splits, library: Library
) -> None:
    x, adapter = dtypes
    check(library, Case((131,), k, 72, 88, 6, h, x, x, adapter), splits)


@given(
    T=st.one_of(st.sampled_from([0, 1, 127, 128, 129]), st.integers(0, 300)),
    k=st.integers(1, 8),
    widths=st.tuples(*[st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130]))] * 2),
    rb=st.one_of(st.integers(1, 9), st.sampled_from([16, 33])),
    h=st.one_of(st.just(0), st.integers(1, 20)),
    dtypes=st.sampled_from(PAIRS),
    splits=st.builds(Splits, st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.0, 0.4]), st.integers(0, 2**62)),
    order=st.tuples(
        st.sampled_from(["fifo", "lifo", "random"]), st.integers(1, 2**31), st.sampled_from(["lazy", "eager", "random"])
    ),
)
@settings(max_examples=60)
def test_random_shapes_orders_and_arrivals_of_copies(
    T: int,
    k: int,
    widths: tuple[int, int],
    rb: int,
    h: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    splits: Splits,
    order: tuple[str, int, str],
    library: Library,
) -> None:
    x, adapter = dtypes
    library.configure(*order)
    check(library, Case((T,), k, *widths, rb, h, x, x, adapter, seed=T), splits)


@pytest.mark.parametrize("h", [0, 3], ids=["", "hybrid"])
@pytest.mark.parametrize(("k", "n", "m", "rb"), [(1, 64, 64, 4), (2, 64, 96, 16), (3, 22, 150, 4), (2, 260, 33, 80)])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "_".join(str(d)[6:] for d in p))
def test_merge(
    dtypes: tuple[torch.dtype, torch.dtype], k: int, n: int, m: int, rb: int, h: int, library: Library
) -> None:
    dtype, adapter_dtype = dtypes
    check_merge(library, Case((1,), k, n, m, rb, h, adapter_dtype=adapter_dtype), dtype)


def test_an_infinity_stays_in_its_token(library: Library) -> None:
    check_infinity(library)


def test_the_mask_is_the_references(library: Library) -> None:
    check_mask(library)


@pytest.mark.parametrize("order", ["0 1 0", "1 1 1", "2 7 0", "2 8 2"])
@pytest.mark.parametrize(
    "shape", ["130 66 90 2 12 5 0 0 2 2 30", "65 96 72 1 20 0 1 0 1 3 0", "1 33 40 1 3 1 2 2 1 1 10"]
)
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_the_sanitizers_find_nothing(variant: str, shape: str, order: str) -> None:
    program = emulated_program([HERE / "kernels_main.cpp", HERE / "kernels.cu"], variant, include=[CSRC])
    done = run(program, *shape.split(), *order.split())
    assert (done.returncode, done.stderr) == (0, "")
