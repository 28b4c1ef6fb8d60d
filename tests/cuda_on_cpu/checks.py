# SPDX-License-Identifier: Apache-2.0
"""What the tests of the kernels and of planted defects share: how a pass is called, and that its results are right."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from calls import ALL_GRADIENTS, Call
from emulated import Library
from helpers import Case, Inputs, assert_near, assert_results_near, expected_results
from torch import Tensor

from gralora_ext import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
# x, base and the adapter as autocast leaves them: a layer's base is of 16 bits beside float32 from a
# norm or an embedding, and the other way round where the layer itself is kept out of it.
AUTOCAST = [
    (x, base, adapter)
    for low in (torch.bfloat16, torch.float16)
    for x, base in ((torch.float32, low), (low, torch.float32))
    for adapter in (torch.float32, low)
]


@dataclass(frozen=True)
class Way:
    """How a pass is called."""

    columns: int = 1  # parts of columns and of tokens; 0: as launch.h chooses
    tokens: int = 1
    dropout: float = 0.0
    seed: int = 123_456_789_012
    keep_u: bool = True
    needs: int = ALL_GRADIENTS
    padding: int = 0  # elements between the rows of activations
    add_to_dx: bool = False  # backward adds to a dx of normal numbers


CHOSEN = Way(0, 0)


def bytes_of(tensor: Tensor | None) -> np.ndarray:
    return np.empty(0, np.uint8) if tensor is None or tensor.numel() == 0 else tensor.view(torch.uint8).numpy()


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel must write: NaN everywhere."""
    return torch.full(size, float("nan"), dtype=dtype)


def padded(tensor: Tensor, padding: int) -> Tensor:
    """[T, width + padding] with NaN in the padding."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return torch.cat([rows, empty(rows.shape[0], padding, dtype=rows.dtype)], 1).contiguous()


def results(library: Library, inputs: Inputs, way: Way) -> dict[str, Tensor]:
    """y and all gradients as the kernels compute them; each launch may touch its own buffers alone."""
    t = {name: tensor.contiguous() for name, tensor in inputs.tensors.items()}
    x, base, A, B = (t[name] for name in ("x", "base", "A", "B"))
    general = [t.get("A_general"), t.get("B_general")]
    k, r, h = A.shape[0], A.shape[2], 0 if general[0] is None else general[0].shape[0]
    N, M = x.shape[-1], base.shape[-1]
    T = x.numel() // N
    call = Call(
        *(T, N, M, k, r, h, DTYPES.index(x.dtype), DTYPES.index(base.dtype), DTYPES.index(A.dtype)),
        *(N + way.padding, M + way.padding, 0, 0, way.needs, int(way.keep_u)),
        *(int(way.add_to_dx), way.columns, way.tokens, way.seed, inputs.scaling, way.dropout),
    )
    accumulation = torch.float64 if torch.float64 in (x.dtype, base.dtype, A.dtype) else torch.float32
    rows = {name: padded(tensor, way.padding) for name, tensor in (("x", x), ("base", base), ("grad", inputs.grad))}
    y, dx = torch.full_like(rows["base"], float("nan")), padded(start_of_dx(x), way.padding)
    if not (way.add_to_dx and way.needs & 1):
        dx.fill_(float("nan"))
    u = empty(T, k * r + h, dtype=accumulation)
    gradients = [None if p is None else torch.full_like(p, float("nan")) for p in (A, B, *general)]

    def launch(name: str, backward: int, **tensors: Tensor | None) -> None:
        library.clear()
        size = library.number("test_workspace", ctypes.byref(call), ctypes.c_int(backward))
        arrays = {key: bytes_of(tensor) for key, tensor in tensors.items()}
        arrays["workspace"] = np.full(size, 0xFF, np.uint8)
        library.register(**{key: array for key, array in arrays.items() if array.size})
        library.register(call=np.frombuffer(call, np.uint8))
        library.launch(name, ctypes.byref(call), *arrays.values())

    adapter = {"A": A, "B": B, "A_general": general[0], "B_general": general[1]}
    launch("test_forward", 0, x=rows["x"], base=rows["base"], y=y, **adapter, u=u if way.keep_u else None)
    assert len(library.launches()) == (2 if T > 0 else 0)
    written = dict(zip(("dA", "dB", "dA_general", "dB_general"), gradients, strict=True))
    kept = u if way.keep_u else None
    launch("test_backward", 1, x=rows["x"], grad_y=rows["grad"], u=kept, **adapter, dx=dx, **written)
    assert len(library.launches()) <= (4 if x.dtype == base.dtype else 6)
    assert y[:, M:].isnan().all() and dx[:, N:].isnan().all()
    named = {"x": dx[:, :N].reshape(x.shape)}
    named.update(zip(("A", "B", "A_general", "B_general"), gradients, strict=True))
    for bit, (name, gradient) in enumerate(list(named.items())):
        if gradient is not None and not way.needs >> bit & 1:
            assert gradient.isnan().all(), f"the gradient of {name} was not asked for"
            named[name] = None
    return {"y": y[:, :M].reshape(base.shape), **{name: g for name, g in named.items() if g is not None}}


def start_of_dx(x: Tensor) -> Tensor:
    """What is added to."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)


def check(library: Library, case: Case, way: Way) -> None:
    inputs = case.inputs()
    options = {"dropout_p": way.dropout, "seed": torch.tensor([way.seed])} if way.dropout else {}
    actual = results(library, inputs, way)
    if way.add_to_dx and "x" in actual:
        expected, _ = expected_results(inputs, reference.gralora, **options)
        dx, start = actual.pop("x"), start_of_dx(inputs.tensors["x"])
        assert_near("x", dx, start.double() + expected["x"])
    assert_results_near(actual, inputs, **options)


def check_merge(library: Library, case: Case, dtype: torch.dtype, layout: str = "rows") -> None:
    """The merged weight, read and written once. layout: which stride of W is 1, or neither."""
    inputs = case.inputs()
    k, N, M = case.k, case.k * case.n, case.k * case.m
    adapter = {name: tensor.contiguous() for name, tensor in inputs.adapter().items()}
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = {name: tensor.double() for name, tensor in adapter.items()}
    expected = weight.double() + reference.delta_weight(**wide, scaling=inputs.scaling)
    step = 2 if layout == "neither" else 1
    memory = weight.T.contiguous() if layout == "columns" else empty(M, N * step, dtype=dtype)
    merged = memory.T if layout == "columns" else memory[:, ::step]
    merged.copy_(weight)
    call = Call(
        *(0, N, M, k, k * case.rb, case.h, 0, DTYPES.index(dtype), DTYPES.index(case.adapter_dtype), 0, 0),
        *(*merged.stride(), 0, 0, 0, 0, 0, 0, inputs.scaling, 0.0),
    )
    library.clear()
    arrays = {
        "weight": bytes_of(memory),
        **{name: bytes_of(adapter.get(name)) for name in ("A", "B", "A_general", "B_general")},
    }
    library.register(**arrays)
    library.launch("test_merge", ctypes.byref(call), *arrays.values())
    assert len(library.launches()) == 1
    assert_near("weight", merged, expected)
    size = weight.numel() * weight.element_size()
    assert library.traffic("weight") == (size, size)


def check_infinity(library: Library) -> None:
    """An infinity in one token's x spoils the rows of that token, and no others."""
    inputs = Case((131,), 2, 72, 88, 6).inputs()
    expected = results(library, inputs, Way())
    inputs.tensors["x"][0, 0] = float("inf")
    actual = results(library, inputs, Way())
    assert not actual["y"][0].isfinite().any()
    for name in ("y", "x"):
        assert torch.equal(actual[name][1:], expected[name][1:])


def check_mask(library: Library) -> None:
    """Which elements are kept, at indices beyond 32 bits too, in groups of 16 that do not begin at a multiple of 16."""
    count, width, seed, threshold = 500, 4099, -987_654_321_012, 20000
    for t, column in [(0, 0), (3, 5), (1_100_000, 17), (2**41, 8)]:
        first = t * width + column
        draws = reference.dropout_draws(seed, torch.arange(first // 16, first // 16 + count + 1))
        expected = draws[first % 16 :][: 16 * count] >= threshold
        kept = np.zeros(count, np.uint16)
        library.clear()
        seeds = np.array([seed])
        library.register(seed=seeds, kept=kept)
        at = (ctypes.c_int64(value) for value in (threshold, width, t, column))
        library.launch("test_mask", seeds, *at, kept, count)
        np.testing.assert_array_equal(np.unpackbits(kept.view(np.uint8), bitorder="little"), expected.numpy())
