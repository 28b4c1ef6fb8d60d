# SPDX-License-Identifier: Apache-2.0
"""Whole passes on the emulator: the arguments of ``calls.h`` from a shape, each array a buffer that is watched."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from emulated import Library

DTYPES = ("fp32", "bf16", "fp16", "fp64")  # in the numbers of calls.h
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
PASSES = ("forward", "backward", "merge")
ALL_GRADIENTS = 31


class Call(ctypes.Structure):
    """The struct of the same name in calls.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("T", "N", "M", "k", "r", "h", "x_dtype", "base_dtype", "adapter_dtype")),
        *((name, ctypes.c_int64) for name in ("x_row", "dx_row", "base_row", "y_row", "grad_row")),
        *((name, ctypes.c_int64) for name in ("weight_row", "weight_column", "needs", "keep_u", "add_to_dx")),
        *((name, ctypes.c_int64) for name in ("overwrite", "column_splits", "token_splits", "seed")),
        *((name, ctypes.c_double) for name in ("scaling", "dropout")),
        *((name, ctypes.c_int64 * 3 * 4) for name in ("strides", "gradient_strides")),
    ]


@dataclass(frozen=True)
class Shape:
    """One call, cut as launch.h chooses; all gradients are wanted."""

    T: int
    N: int
    M: int
    k: int
    r: int
    h: int = 0
    dtype: str = "bf16"  # of activations and W
    adapter: str = "fp32"
    dropout: float = 0.0
    keep_u: bool = True
    padding: int = 0  # elements between the rows of activations
    columns: int = 0  # parts of columns and of tokens; 0: as launch.h chooses
    tokens: int = 0
    add_to_dx: bool = False

    def call(self) -> Call:
        dtype, adapter = DTYPES.index(self.dtype), DTYPES.index(self.adapter)
        return Call(
            *(self.T, self.N, self.M, self.k, self.r, self.h, dtype, dtype, adapter),
            *([self.N + self.padding] * 2 + [self.M + self.padding] * 3),
            *(self.N, 1, ALL_GRADIENTS, self.keep_u, self.add_to_dx, False),
            *(self.columns, self.tokens, 123_456_789_012, 0.75, self.dropout),
        )

    def splits(self, library: Library, which: str) -> tuple[int, int]:
        """Into how many parts ``which`` cuts columns and tokens."""
        if self.columns:
            return self.columns, self.tokens
        splits = (ctypes.c_int64 * 2)()
        library.number("test_plan", ctypes.byref(self.call()), ctypes.c_int(which == "backward"), splits)
        return splits[0], splits[1]

    def sizes(self, which: str) -> dict[str, int]:
        """The bytes of the arguments of ``which`` in their order, but for the workspace."""
        element, parameter = ELEMENT[self.dtype], ELEMENT[self.adapter]
        x, y = (self.T * (width + self.padding) * element for width in (self.N, self.M))
        u = self.T * (self.k * self.r + self.h) * max(4, element, parameter) * self.keep_u
        adapter = {
            "A": self.N * self.r,
            "B": self.M * self.r,
            "A_general": self.h * self.N,
            "B_general": self.M * self.h,
        }
        adapter = {name: count * parameter for name, count in adapter.items()}
        if which == "forward":
            return {"x": x, "base": y, "y": y, **adapter, "u": u}
        if which == "backward":
            gradients = {f"d{name}": size for name, size in adapter.items()}
            return {"x": x, "grad_y": y, "u": u, **adapter, "dx": x, **gradients}
        return {"weight": self.N * self.M * element, **adapter}


def arrays_of(library: Library, shape: Shape, which: str) -> dict[str, np.ndarray]:
    """Zeros for all arguments of ``which``, the workspace too, as bytes at multiples of 16."""
    sizes = shape.sizes(which)
    if which != "merge":
        call = ctypes.byref(shape.call())
        sizes["workspace"] = library.number("test_workspace", call, ctypes.c_int(which == "backward"))
    return {name: aligned_zeros(size) for name, size in sizes.items()}


def run(library: Library, shape: Shape, which: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Launches ``which``; kernels may touch these arrays and the seed alone, which lies in the bytes that are returned."""
    call = shape.call()
    seed = np.frombuffer(call, np.uint8)
    library.clear()
    library.register(**{name: array for name, array in arrays.items() if array.size})
    library.register(seed=seed)
    library.launch(f"test_{which}", ctypes.byref(call), *arrays.values())
    return seed


def aligned_zeros(size: int) -> np.ndarray:
    room = np.zeros(size + 16, np.uint8)
    start = -room.ctypes.data % 16
    return room[start : start + size]
