# SPDX-License-Identifier: Apache-2.0
"""Conversions between types, and of addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import SHARED_BASE
from .registry import opcode
from .types import TYPES, bf16_to_f32, f32_to_bf16, is_float

if TYPE_CHECKING:
    from .interpreter import Block
    from .parser import Instruction

TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt")
def convert(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """``cvt.rounding.to.from``; of the roundings to a narrower float only the nearest."""
    *modifiers, to, source = instruction.modifiers
    if set(modifiers) - {"rn", "ftz", "sat", "satfinite", *TO_INTEGER} or "satfinite" in modifiers:
        raise NotImplementedError(instruction.text)
    result, *operands = instruction.operands
    values = [_float(block, operand, source) for operand in operands]
    if to in ("bf16x2", "f16x2"):  # the first operand goes to the high half
        high, low = (_narrow(value, to.removesuffix("x2")).view(np.uint16).astype(np.uint32) for value in values)
        return block.put(result, high << 16 | low, lanes)
    (value,) = values
    if to == "bf16":
        return block.put(result, _narrow(value, to), lanes)
    if value.dtype.kind == "f":
        rounding = next((word for word in modifiers if word in TO_INTEGER), None)
        if rounding is not None:
            value = TO_INTEGER[rounding](value)
        if not is_float(to):
            return block.put(result, _saturate(value, TYPES[to]), lanes)
        if "sat" in modifiers:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1))
    elif "sat" in modifiers:
        raise NotImplementedError(instruction.text)
    block.put(result, value.astype(TYPES[to]), lanes)


def _float(block: Block, operand: str, source: str) -> np.ndarray:
    value = block.get(operand, source)
    return bf16_to_f32(value) if source == "bf16" else value


def _narrow(value: np.ndarray, to: str) -> np.ndarray:
    if to == "f16":
        return value.astype(np.float16)
    if value.dtype != np.float32:
        raise NotImplementedError(f"{value.dtype} to {to}")
    return f32_to_bf16(value)


def _saturate(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """To the nearest integer there is; NaN to zero."""
    limits = np.iinfo(dtype)
    wide = value.astype(np.float64)
    converted = np.where(np.isnan(wide), 0, wide)
    # float(max) of 64 bits is one too many.
    inside = (converted >= float(limits.min)) & (converted < float(limits.max))
    integers = np.where(inside, converted, 0).astype(dtype)
    return np.where(inside, integers, np.where(converted < 0, limits.min, limits.max).astype(dtype))


@opcode("cvta")
def convert_address(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """Between generic addresses and those of a space; global ones are the same."""
    result, address = instruction.operands
    value = block.get(address, instruction.type).astype(np.int64)
    if "shared" in instruction.modifiers:
        value = value - SHARED_BASE if "to" in instruction.modifiers else value + SHARED_BASE
    elif "global" not in instruction.modifiers:
        raise NotImplementedError(instruction.text)
    block.put(result, value.astype(np.uint64), lanes)
