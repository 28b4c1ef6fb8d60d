# SPDX-License-Identifier: Apache-2.0
"""Loads, stores, atomics, asynchronous copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxError
from .parser import members
from .registry import opcode
from .types import TYPES

if TYPE_CHECKING:
    from .interpreter import Block
    from .parser import Instruction

COUNT = {"v2": 2, "v4": 4}


def _space(instruction: Instruction) -> str:
    for modifier in instruction.modifiers:
        name = modifier.split("::")[0]
        if name in ("param", "global", "shared"):
            return name
        if name in ("local", "const"):
            raise NotImplementedError(instruction.text)
    return "generic"


def _as_bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


@opcode("ld", "ldu")
def load(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    results, address = instruction.operands
    dtype = TYPES[instruction.type]
    names = members(results)
    size = len(names) * dtype.itemsize
    if _space(instruction) == "param":
        data = np.zeros((block.threads, size), np.uint8)
        data[lanes] = block.parameters.load(block.address(address)[lanes], size)
    else:
        data = block.load(_space(instruction), block.address(address), size, lanes)
    values = data.view(dtype)
    for i, name in enumerate(names):
        block.put(name, np.ascontiguousarray(values[:, i]), lanes)


@opcode("st")
def store(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    address, values = instruction.operands
    data = [_as_bytes(block.get(name, instruction.type)) for name in members(values)]
    block.store(_space(instruction), block.address(address), np.concatenate(data, axis=1), lanes)


@opcode("atom", "red")
def atomic_add(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """One thread after the other."""
    if "add" not in instruction.modifiers or instruction.type in ("bf16", "f16x2", "bf16x2"):
        raise NotImplementedError(instruction.text)
    *result, address, value = instruction.operands
    addresses = block.address(address)
    values = block.get(value, instruction.type)
    for thread in np.flatnonzero(lanes):
        alone = np.zeros(block.threads, bool)
        alone[thread] = True
        (piece,) = block.pieces(_space(instruction), addresses, values.itemsize, alone)
        cell = piece.data[piece.offsets[0] : piece.offsets[0] + values.itemsize].view(values.dtype)
        if result:
            block.put(result[0], np.full(block.threads, cell[0]), alone)
        cell[0] += values[thread]


@dataclass
class Copy:
    """Of some threads, each in the group that it had open."""

    to: np.ndarray
    data: np.ndarray
    lanes: np.ndarray
    group: np.ndarray

    def note(self, block: Block) -> None:
        """To the race detector it may land at any time until it has."""
        if self.lanes.any():
            for piece in block.pieces("shared", self.to, self.data.shape[1], self.lanes):
                block.shared.note_copy(piece, self.data.shape[1])


@opcode("cp")
def copy_async(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    if instruction.modifiers[0] != "async" or "bulk" in instruction.modifiers:
        raise NotImplementedError(instruction.text)
    if "commit_group" in instruction.modifiers:
        block.committed[lanes] += 1
    elif "wait_group" in instruction.modifiers:
        _land(block, lanes, block.committed - int(instruction.operands[0]))
    elif "wait_all" in instruction.modifiers:
        _land(block, lanes, block.committed + 1)
    elif "mbarrier" in instruction.modifiers:
        raise NotImplementedError(instruction.text)
    else:
        _issue(block, instruction, lanes)


def _land(block: Block, lanes: np.ndarray, before: np.ndarray) -> None:
    """What ``lanes`` copied in groups before these."""
    for copy in block.copies:
        ready = lanes & copy.lanes & (copy.group < before)
        if ready.any():
            block.store("shared", copy.to, copy.data, ready)
            copy.lanes &= ~ready
    block.copies = [copy for copy in block.copies if copy.lanes.any()]


def _issue(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    to, source, size, *valid = instruction.operands
    size = int(size)
    if size not in (4, 8, 16) or ("cg" in instruction.modifiers and size != 16):
        raise PtxError(f"cp.async of {size} bytes")
    if valid and valid[0] in block.registers and block.registers[valid[0]].dtype == bool:
        raise NotImplementedError(instruction.text)
    valid = block.get(valid[0], "u32").astype(np.int64) if valid else np.full(block.threads, size)
    if (valid[lanes] > size).any():
        raise PtxError(f"cp.async of {valid[lanes].max()} valid bytes in {size}")
    sources = block.address(source)
    data = np.zeros((block.threads, size), np.uint8)
    for count in np.unique(valid[lanes & (valid > 0)]):
        some = np.flatnonzero(lanes & (valid == count))
        if (sources[some] % size).any():
            raise PtxError("cp.async: misaligned source")
        for piece in block.memory.find(some, sources[some], int(count)):
            data[piece.lanes, :count] = piece.data[piece.bytes(int(count))]
    copy = Copy(block.address(to), data, lanes.copy(), block.committed.copy())
    copy.note(block)
    block.copies.append(copy)
