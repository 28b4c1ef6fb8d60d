# SPDX-License-Identifier: Apache-2.0
"""What the tests of the kernels and of planted defects share: how a pass is called, and that its results are right."""

from __future__ import annotations

import ctypes
import mmap
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from calls import ALL_GRADIENTS, Call
from emulated import Library
from helpers import MERGE_MISROUNDED, Case, Inputs, assert_near, assert_results_near
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
# x, base and the adapter as autocast leaves them: a layer's base is of 16 bits beside float32 from
# a norm or an embedding, and the other way round where the layer itself is kept out of it.
AUTOCAST = [
    (x, base, adapter)
    for low in (torch.bfloat16, torch.float16)
    for x, base in ((torch.float32, low), (low, torch.float32))
    for adapter in (torch.float32, low)
]

# Share of the elements of y and dx that may be rounded to the neighbour of the correctly rounded
# value: their summands are right to 2^-16, and 0.4 % and 2.4 % were met.
MISROUNDED = {torch.bfloat16: 0.01, torch.float16: 0.05}
NAMES = ("A", "B", "A_general", "B_general")


@dataclass(frozen=True)
class Way:
    """How a pass is called."""

    columns: int = 1  # parts of columns and of tokens; 0: as launch.h chooses
    tokens: int = 1
    dropout: float = 0.0
    seed: int = 123_456_789_012
    keep_u: bool = True
    needs: int = ALL_GRADIENTS
    padding: int = 0  # between the rows of activations, of each another multiple of it (see results)
    offset: int = 0  # elements of aligned memory before the first of each tensor
    add_to_dx: bool = False  # backward adds to a dx of normal numbers
    apart: int = 1  # times as far apart as their layout says are the elements of the adapter


CHOSEN = Way(0, 0)

# Elements from a row to the next beyond which 32 bits do not count them
FAR = 2**31


def bytes_of(tensor: Tensor | None) -> np.ndarray:
    """From the first element to the last, whatever lies between them."""
    if tensor is None or tensor.numel() == 0:
        return np.empty(0, np.uint8)
    return tensor.as_strided((span(tensor.shape, tensor.stride()),), (1,)).view(torch.uint8).numpy()


def span(size: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of memory from the first of a tensor to its last"""
    return 1 + sum((count - 1) * stride for count, stride in zip(size, strides, strict=True)) if all(size) else 0


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel must write: NaN everywhere."""
    return torch.full(size, float("nan"), dtype=dtype)


def among_nan(values: Tensor, strides: Sequence[int], offset: int = 0) -> Tensor:
    """``values`` with these strides, ``offset`` elements into memory that holds NaN elsewhere."""
    size = offset + span(values.shape, strides)
    if max(strides) < FAR:
        memory = empty(size, dtype=values.dtype)
    else:  # zeros, of which there is what somebody touches
        with tempfile.TemporaryFile() as file:
            file.truncate(size * values.element_size())
            memory = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=values.dtype)
    return memory.as_strided(values.shape, strides, offset).copy_(values)


def is_untouched_between_rows(rows: Tensor) -> bool:
    """Whether what follows each row but the last still holds what ``among_nan`` left there."""
    between = rows.as_strided(
        (max(rows.shape[0] - 1, 0), min(rows.stride(0) - rows.shape[1], 64)),
        rows.stride(),
        rows.storage_offset() + rows.shape[1],
    )
    return bool((between == 0).all() if rows.stride(0) >= FAR else between.isnan().all())


def strides_of(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.Array[ctypes.c_int64]]:
    """Of parameters or their gradients, those of the general part as one block"""
    strides = (ctypes.c_int64 * 3 * 4)()
    for of_tensor, tensor in zip(strides, tensors, strict=True):
        if tensor is not None:
            of_tensor[:] = (0, *tensor.stride())[-3:]
    return strides


def results(library: Library, inputs: Inputs, way: Way) -> dict[str, Tensor]:
    """y and all gradients as the kernels compute them; each launch may touch its own buffers alone."""
    t = inputs.tensors
    x, base = t["x"], t["base"]
    adapter: dict[str, Tensor | None] = dict.fromkeys(NAMES)
    for name in t.keys() & set(NAMES):
        adapter[name] = among_nan(t[name], [way.apart * stride for stride in t[name].stride()], way.offset)
    gradients = {name: None if p is None else torch.full_like(p, float("nan")) for name, p in adapter.items()}
    k, _, r = t["A"].shape
    h = t["A_general"].shape[0] if "A_general" in t else 0
    N, M = x.shape[-1], base.shape[-1]
    T = x.numel() // N

    def rows(tensor: Tensor, paddings: int) -> Tensor:
        width = tensor.shape[-1]
        return among_nan(tensor.reshape(-1, width), (width + paddings * way.padding, 1), way.offset)

    # The rows of each lie at a distance of their own: one taken for another's is seen.
    nothing = torch.tensor(float("nan"))
    in_dx = start_of_dx(x) if way.add_to_dx and way.needs & 1 else nothing.to(x.dtype).expand(x.shape)
    activations = {
        "x": rows(x, 1),
        "dx": rows(in_dx, 2),
        "base": rows(base, 1),
        "y": rows(nothing.to(base.dtype).expand(base.shape), 2),
        "grad": rows(inputs.grad, 3),
    }
    call = Call(
        *(T, N, M, k, r, h, *(DTYPES.index(t[name].dtype) for name in ("x", "base", "A"))),
        *(tensor.stride(0) for tensor in activations.values()),
        *(0, 0, way.needs, int(way.keep_u), int(way.add_to_dx), 0),
        *(way.columns, way.tokens, way.seed, inputs.scaling, way.dropout),
        *(strides_of(tuple(tensors.values())) for tensors in (adapter, gradients)),
    )
    u = empty(
        T, k * r + h, dtype=torch.float64 if torch.float64 in (x.dtype, base.dtype, t["A"].dtype) else torch.float32
    )

    def launch(name: str, backward: int, **tensors: Tensor | None) -> None:
        library.clear()
        size = library.number("test_workspace", ctypes.byref(call), ctypes.c_int(backward))
        arrays = {key: bytes_of(tensor) for key, tensor in tensors.items()}
        arrays["workspace"] = np.full(size, 0xFF, np.uint8)
        library.register(**{key: array for key, array in arrays.items() if array.size})
        library.register(call=np.frombuffer(call, np.uint8))
        library.launch(name, ctypes.byref(call), *arrays.values())

    rows_x, dx, rows_base, y, grad = activations.values()
    kept = u if way.keep_u else None
    launch("test_forward", 0, x=rows_x, base=rows_base, y=y, **adapter, u=kept)
    assert len(library.launches()) == (2 if T > 0 else 0)
    written = {f"d{name}": gradient for name, gradient in gradients.items()}
    launch("test_backward", 1, x=rows_x, grad_y=grad, u=kept, **adapter, dx=dx, **written)
    assert len(library.launches()) <= (4 if x.dtype == base.dtype else 6)
    assert is_untouched_between_rows(y) and is_untouched_between_rows(dx)
    named = {"x": dx.reshape(x.shape), **gradients}
    for bit, (name, gradient) in enumerate(list(named.items())):
        if gradient is not None and not way.needs >> bit & 1:
            assert gradient.isnan().all(), f"the gradient of {name} was not asked for"
            named[name] = None
    return {"y": y.reshape(base.shape), **{name: g for name, g in named.items() if g is not None}}


def start_of_dx(x: Tensor) -> Tensor:
    """What is added to."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)


def check(library: Library, case: Case, way: Way) -> None:
    inputs = case.inputs()
    options = {"dropout_p": way.dropout, "seed": torch.tensor([way.seed])} if way.dropout else {}
    actual = results(library, inputs, way)
    dx = actual.pop("x") if way.add_to_dx and "x" in actual else None
    expected = assert_results_near(actual, inputs, **options)
    if dx is not None:
        expected["x"] += start_of_dx(inputs.tensors["x"]).double()
        assert_near("x", dx, expected["x"])
        actual["x"] = dx
    for name in ("y", "x"):
        if name in actual:
            assert_rounded_once(name, actual[name], expected[name])


def assert_rounded_once(name: str, actual: Tensor, expected: Tensor, most: float | None = None) -> None:
    """Nearly every element of a 16-bit result is the one nearest to the sum."""
    enough = 4096
    if actual.dtype in MISROUNDED and actual.numel() >= enough:
        share = (actual != expected.to(actual.dtype)).double().mean()
        assert share < (most or MISROUNDED[actual.dtype]), f"{name}: {share:.1%} of the elements are not the nearest"


def check_merge(
    library: Library, case: Case, dtype: torch.dtype, layout: str = "rows", offset: int = 0, *, overwrite: bool = False
) -> None:
    """The merged weight, read and written once, or dW alone; aligned memory begins ``offset`` elements before each tensor."""
    inputs = case.inputs()
    k, N, M = case.k, case.k * case.n, case.k * case.m
    adapter = {name: among_nan(tensor, tensor.stride(), offset) for name, tensor in inputs.adapter().items()}
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = {name: tensor.double() for name, tensor in adapter.items()}
    expected = reference.delta_weight(**wide, scaling=inputs.scaling)
    expected = expected if overwrite else weight.double() + expected
    strides = {"rows": (N, 1), "columns": (1, M), "neither": (2 * N, 2), "padded": (N + 4, 1), "far": (FAR, 1)}[layout]
    merged = among_nan(weight.fill_(float("nan")) if overwrite else weight, strides, offset)
    parameters = [adapter.get(name) for name in NAMES]
    call = Call(
        *(0, N, M, k, k * case.rb, case.h, 0, DTYPES.index(dtype), DTYPES.index(case.adapter_dtype), 0, 0, 0, 0, 0),
        *(*strides, 0, 0, 0, int(overwrite), 0, 0, 0, inputs.scaling, 0.0, strides_of(parameters)),
    )
    library.clear()
    arrays = {"weight": bytes_of(merged), **dict(zip(NAMES, map(bytes_of, parameters), strict=True))}
    library.register(**{name: array for name, array in arrays.items() if array.size})
    library.launch("test_merge", ctypes.byref(call), *arrays.values())
    assert len(library.launches()) == 1
    assert_near("weight", merged, expected)
    assert_rounded_once("weight", merged, expected, MERGE_MISROUNDED)
    size = weight.numel() * weight.element_size()
    assert library.traffic("weight") == (0 if overwrite else size, size)


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


def check_choices(library: Library) -> None:
    """Which kernels a call gets, and that no work is left out where there is little, or where little is asked for."""
    bf16, f32 = torch.bfloat16, torch.float32
    small = Case((33,), 2, 24, 40, 2, 3, bf16, bf16, f32)
    check(library, small, Way(0, 0, needs=8))
    assert library.launches() == ["project", "weight_gradient", "reduce"]
    check(library, replace(small, leading=(0,)), CHOSEN)
    check(library, replace(small, x_dtype=f32, base_dtype=torch.float16, adapter_dtype=bf16), CHOSEN)
    assert library.launches() == ["products"] * 3, "a gradient of another 16 bits than the adapter's"
    library.device(75)
    check(library, small, CHOSEN)
    assert library.launches() == ["products"] * 3
    check_merge(library, small, bf16)
    library.device()
    for way in ({"N": FAR, "M": 2}, {"N": 2, "M": FAR}):  # columns of a block are counted in 32 bits on tensor cores
        call = Call(T=1, k=1, r=1, x_row=FAR, keep_u=1, scaling=1.0, **way)
        assert library.number("test_workspace", ctypes.byref(call), 0) == 0, "the plain kernels need none"


def check_memory(library: Library) -> None:
    """Tensors whose rows and blocks lie anywhere: where vectors can be loaded, and where one of the conditions fails."""
    bf16, f32 = torch.bfloat16, torch.float32
    rows = Case((40,), 2, 12, 20, 2, 3, bf16, bf16, f32)
    check(library, rows, Way(padding=8))  # a block is not whole vectors
    check(library, replace(rows, n=24, m=40), Way(padding=8, offset=1))  # an address
    check(library, replace(rows, n=24, m=40), Way(padding=4))  # some rows
    # Of the adapter: groups of four that end within a row's memory, but not within the block;
    # blocks that begin between groups of four; no stride of 1
    for k, rb, layout in ((2, 3, "padded"), (3, 2, "leading_permuted"), (2, 2, "column_stride")):
        adapter = Case((40,), k, 10, 10, rb, 2, bf16, bf16, f32, adapter_layout=layout)
        check(library, adapter, Way(2, 2))
        check_merge(library, adapter, f32)
    check(library, replace(rows, n=24, m=40), Way(apart=4))
    check_merge(library, Case((1,), 2, 24, 40, 2, 3), bf16, "padded", offset=1)
    for dtype in (f32, torch.float64):  # on tensor cores, and by the plain kernels
        check_merge(library, Case((1,), 2, 24, 40, 2, 3), dtype, overwrite=True)


def check_far(library: Library) -> None:
    """Rows and latents at places beyond 32 bits."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    for adapter in (f32, f16):  # on tensor cores, and by the plain kernels
        check(library, Case((2,), 2, 24, 24, 2, 3, bf16, bf16, adapter), Way(0, 0, 0.3, padding=FAR, add_to_dx=True))
        check_merge(library, Case((1,), 2, 8, 2, 2, adapter_dtype=adapter), bf16, "far")
    T, k, r, h, splits = 2**21, 8, 256, 3, 2
    call = Call(T=T, k=k, r=r, h=h, column_splits=splits)
    for split, t, block in [(0, 1, 1), (1, 0, 0), (1, T - 1, k - 1)]:
        place = ctypes.byref(call), *map(ctypes.c_int64, (split, t, block))
        assert library.number("test_place_of_latents", *place) == ((split * T + t) * k + block) * (r + h)
        place = ctypes.byref(call), *map(ctypes.c_int64, (-1, t, block))
        assert library.number("test_place_of_latents", *place) == t * (k * r + h) + block * r
