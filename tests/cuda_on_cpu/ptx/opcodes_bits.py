# SPDX-License-Identifier: Apache-2.0
"""Bits: logic, shifts, permutations, moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .parser import members
from .registry import allow, opcode
from .types import TYPES, UNSIGNED, is_signed

if TYPE_CHECKING:
    from .interpreter import Block
    from .parser import Instruction

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@opcode("and", "or", "xor", "not")
def logic(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    result, *operands = instruction.operands
    values = [block.get(operand, instruction.type) for operand in operands]
    block.put(result, LOGIC[instruction.opcode](*values), lanes)


@opcode("shl", "shr")
def shift(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """By the width or more nothing is left but the sign."""
    result, value, distance = instruction.operands
    value = block.get(value, instruction.type)
    distance = block.get(distance, "u32").astype(np.int64)
    bits = 8 * value.itemsize
    within = np.minimum(distance, bits - 1).astype(value.dtype)
    if instruction.opcode == "shl":
        shifted = np.where(distance < bits, value << within, 0)
    elif is_signed(instruction.type):
        shifted = value >> within
    else:
        shifted = np.where(distance < bits, value >> within, 0)
    block.put(result, shifted.astype(value.dtype), lanes)


@opcode("shf")
def funnel_shift(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """A half of the 64 bits ``high:low``, shifted: the high one of a left shift, the low one of a right shift."""
    direction, mode = instruction.modifiers[:2]
    result, low, high, distance = instruction.operands
    both = block.get(high, "b32").astype(np.uint64) << np.uint64(32) | block.get(low, "b32")
    distance = block.get(distance, "u32").astype(np.uint64)
    distance = distance & np.uint64(31) if mode == "wrap" else np.minimum(distance, np.uint64(32))
    shifted = both << distance >> np.uint64(32) if direction == "l" else both >> distance
    block.put(result, shifted.astype(np.uint32), lanes)


@opcode("lop3")
def logic_of_three(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """Bit i of the table is the result for the inputs' bits a, b, c with i = 4 a + 2 b + c."""
    allow(instruction)
    result, *inputs, table = instruction.operands
    a, b, c = (block.get(operand, "b32") for operand in inputs)
    value = np.zeros(block.threads, np.uint32)
    for i in range(8):
        if int(table, 0) >> i & 1:
            value |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    block.put(result, value, lanes)


@opcode("prmt")
def permute_bytes(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """Each nibble of the selector picks one of the eight bytes b:a, or with its high bit that byte's sign, repeated."""
    allow(instruction)
    result, a, b, selector = instruction.operands
    source = np.stack([block.get(a, "b32"), block.get(b, "b32")], axis=1).view(np.uint8)
    selector = block.get(selector, "u32")
    picked = np.zeros((block.threads, 4), np.uint8)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i) & 15).astype(np.int64)
        byte = source[np.arange(block.threads), nibble & 7]
        picked[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    block.put(result, picked.view(np.uint32).ravel(), lanes)


@opcode("bfe")
def extract_bits(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    if instruction.type != "u32":
        raise NotImplementedError(instruction.text)
    result, value, start, length = instruction.operands
    start = np.minimum(block.get(start, "u32") & 255, 63).astype(np.uint64)
    length = np.minimum(block.get(length, "u32") & 255, 32).astype(np.uint64)
    mask = (np.uint64(1) << length) - np.uint64(1)
    block.put(result, (block.get(value, "u32").astype(np.uint64) >> start & mask).astype(np.uint32), lanes)


@opcode("bfi")
def insert_bits(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """``bfi.b32 result, bits, into, start, length``: the low bits of one, from a place on, in the other."""
    if instruction.modifiers != ("b32",):
        raise NotImplementedError(instruction.text)
    result, bits, into, start, length = instruction.operands
    bits, into = block.get(bits, "b32").astype(np.uint64), block.get(into, "b32").astype(np.uint64)
    start = np.minimum(block.get(start, "u32") & 255, 32).astype(np.uint64)
    length = np.minimum(block.get(length, "u32") & 255, 32).astype(np.uint64)
    mask = (np.uint64(1) << length) - np.uint64(1) << start
    block.put(result, (bits << start & mask | into & ~mask).astype(np.uint32), lanes)


@opcode("mov")
def move(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """Also packs ``{low, high}`` into one register, and unpacks."""
    to, value = instruction.operands
    if value.startswith("{"):
        parts = members(value)
        size = TYPES[instruction.type].itemsize // len(parts)
        halves = [block.get(part, f"b{8 * size}") for part in parts]
        packed = np.stack(halves, axis=1).view(UNSIGNED[size * len(parts)]).ravel()
        return block.put(to, packed, lanes)
    whole = block.get(value, instruction.type)
    if not to.startswith("{"):
        return block.put(to, whole, lanes)
    parts = members(to)
    pieces = np.ascontiguousarray(whole).view(UNSIGNED[whole.itemsize // len(parts)]).reshape(block.threads, -1)
    for part, piece in zip(parts, pieces.T, strict=True):
        block.put(part, piece, lanes)
