# SPDX-License-Identifier: Apache-2.0
"""Arithmetic and comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .registry import allow, opcode
from .types import TYPES, is_float, is_signed

if TYPE_CHECKING:
    from .interpreter import Block
    from .parser import Instruction

COMPUTED_TYPES = {name for name in TYPES if name[0] in "us"} | {"f16", "f32", "f64"}
BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
}
# Approximations are as good as numpy's functions, which is better than the hardware's.
UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
}
# Of two ordered numbers; the names for unsigned integers are others for the same.
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _inputs(block: Block, instruction: Instruction) -> list[np.ndarray]:
    if instruction.type not in COMPUTED_TYPES:
        raise NotImplementedError(instruction.text)
    return [block.get(operand, instruction.type) for operand in instruction.operands[1:]]


def _put(block: Block, instruction: Instruction, value: np.ndarray, lanes: np.ndarray) -> None:
    block.put(instruction.operands[0], value.astype(TYPES[instruction.type]), lanes)


@opcode("add", "sub")
def add(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    allow(instruction, "rn", "ftz")
    a, b = _inputs(block, instruction)
    _put(block, instruction, BINARY[instruction.opcode](a, b), lanes)


@opcode("neg", "abs", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos")
def unary(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    allow(instruction, "rn", "ftz", "approx")
    (a,) = _inputs(block, instruction)
    _put(block, instruction, UNARY[instruction.opcode](a), lanes)


@opcode("min", "max")
def extreme(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """Of a number and NaN the number."""
    allow(instruction, "ftz")
    a, b = _inputs(block, instruction)
    _put(block, instruction, (np.fmin if instruction.opcode == "min" else np.fmax)(a, b), lanes)


@opcode("div", "rem")
def divide(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """Integers towards zero."""
    allow(instruction, "rn", "approx", "full", "ftz")
    a, b = _inputs(block, instruction)
    if is_float(instruction.type):
        return _put(block, instruction, a / b, lanes)
    quotient = a // np.where(b == 0, 1, b).astype(b.dtype)
    if is_signed(instruction.type):
        inexact = quotient * b != a
        quotient = quotient + (inexact & ((a < 0) != (b < 0)))
    _put(block, instruction, quotient if instruction.opcode == "div" else a - quotient * b, lanes)


@opcode("mul", "mad", "fma")
def multiply(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    allow(instruction, "rn", "ftz", "lo", "hi", "wide")
    if "wide" in instruction.modifiers:
        return _multiply_wide(block, instruction, lanes)
    a, b, *addend = _inputs(block, instruction)
    if is_float(instruction.type) and addend:
        # In double the product of two floats is exact; the sum is rounded twice, which is rare to show.
        exact = np.longdouble if instruction.type == "f64" else np.float64
        return _put(block, instruction, a.astype(exact) * b + addend[0], lanes)
    if "hi" in instruction.modifiers:
        product = (a.astype(object) * b.astype(object)) >> 8 * a.itemsize
        product = product.astype(a.dtype)
    else:
        product = a * b
    _put(block, instruction, product + addend[0] if addend else product, lanes)


def _multiply_wide(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    narrow = instruction.type
    wide = narrow[0] + str(2 * int(narrow[1:]))
    result, a, b, *addend = instruction.operands
    product = block.get(a, narrow).astype(TYPES[wide]) * block.get(b, narrow).astype(TYPES[wide])
    if addend:
        product = product + block.get(addend[0], wide)
    block.put(result, product, lanes)


@opcode("setp")
def compare(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """``setp.lt.and.s32 p|q, a, b, c``: p = a < b and c, q = not a < b and c."""
    name, *others = instruction.modifiers[:-1]
    results, a, b, *condition = instruction.operands
    a, b = block.get(a, instruction.type), block.get(b, instruction.type)
    true = _compare(name, a, b, is_float(instruction.type))
    false = ~true
    if condition:
        operation = COMBINE[next(word for word in others if word in COMBINE)]
        negated = condition[0].startswith("!")
        other = block.get(condition[0].lstrip("!"), "pred") ^ negated
        true = operation(true, other)
        false = operation(false, other)
    for result, value in zip(results.split("|"), (true, false), strict=False):
        block.put(result, value, lanes)


def _compare(name: str, a: np.ndarray, b: np.ndarray, floats: bool) -> np.ndarray:
    if not floats:
        return COMPARE[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name == "nan":
        return unordered
    if name == "num":
        return ~unordered
    if name.endswith("u"):
        return COMPARE[name[:-1]](a, b) | unordered
    return COMPARE[name](a, b) & ~unordered


@opcode("selp")
def select(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    result, a, b, condition = instruction.operands
    chosen = np.where(block.get(condition, "pred"), block.get(a, instruction.type), block.get(b, instruction.type))
    block.put(result, chosen, lanes)
