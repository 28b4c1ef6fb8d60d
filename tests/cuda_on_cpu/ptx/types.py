# SPDX-License-Identifier: Apache-2.0
"""PTX's types as numpy's. bf16 and the packed types have none: they are handled as bits."""

from __future__ import annotations

import numpy as np

TYPES = {
    "pred": np.dtype(bool),
    "b8": np.dtype(np.uint8),
    "u8": np.dtype(np.uint8),
    "s8": np.dtype(np.int8),
    "b16": np.dtype(np.uint16),
    "u16": np.dtype(np.uint16),
    "s16": np.dtype(np.int16),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "b32": np.dtype(np.uint32),
    "u32": np.dtype(np.uint32),
    "s32": np.dtype(np.int32),
    "f32": np.dtype(np.float32),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "b64": np.dtype(np.uint64),
    "u64": np.dtype(np.uint64),
    "s64": np.dtype(np.int64),
    "f64": np.dtype(np.float64),
}
UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


def unsigned(dtype: np.dtype) -> np.dtype:
    """The unsigned integer of the same size; a predicate's is itself."""
    return dtype if dtype == bool else UNSIGNED[dtype.itemsize]


def is_signed(ptx_type: str) -> bool:
    return ptx_type[0] == "s"


def is_float(ptx_type: str) -> bool:
    return ptx_type in ("f16", "f32", "f64")


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even; NaN becomes the canonical one."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
