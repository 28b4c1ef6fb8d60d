# SPDX-License-Identifier: Apache-2.0
"""Branches, barriers, and what the lanes of a warp exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxError
from .registry import opcode

if TYPE_CHECKING:
    from .interpreter import Block
    from .parser import Instruction


@opcode("bra")
def branch(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    block.counter[lanes] = block.kernel.labels[instruction.operands[0]]


@opcode("ret", "exit")
def leave(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    block.returned |= lanes


@opcode("bar", "barrier")
def barrier(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    warps = block.whole_warps(lanes)
    if instruction.modifiers[0] == "warp":
        for warp in warps:
            block.shared.warp_barrier(warp)
    elif "sync" in instruction.modifiers and instruction.operands == ("0",):
        block.waiting |= lanes
    else:
        raise NotImplementedError(instruction.text)


@opcode("shfl")
def shuffle(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """``shfl.sync.mode.b32 result|inside, value, b, c, mask``; c holds the segments' mask and the last lane."""
    _, mode, _ = instruction.modifiers
    results, value, b, c, mask = instruction.operands
    value = block.get(value, "b32")
    b = block.get(b, "u32").astype(np.int64) & 31
    c = block.get(c, "u32").astype(np.int64)
    lane = block.lane
    segment = c >> 8 & 31
    last = (lane & segment) | (c & 31 & ~segment)
    first = lane & segment
    source = {"bfly": lane ^ b, "down": lane + b, "up": lane - b, "idx": first | (b & ~segment)}[mode]
    inside = source >= last if mode == "up" else source <= last
    source = np.where(inside, source, lane)
    threads = np.arange(block.threads) // 32 * 32 + source
    if not lanes[np.minimum(threads[lanes], block.threads - 1)].all() or (threads[lanes] >= block.threads).any():
        raise PtxError("reads an inactive lane")
    _check_mask(block, lanes, block.get(mask, "b32"))
    taken = value[np.minimum(threads, block.threads - 1)]
    for name, result in zip(results.split("|"), (taken, inside), strict=False):
        block.put(name, result, lanes)


def _by_warp(block: Block, lanes: np.ndarray) -> np.ndarray:
    """[threads]: the mask of the thread's warp, a bit per lane."""
    padded = np.concatenate([lanes, np.zeros(-block.threads % 32, bool)])
    return np.repeat(np.packbits(padded, bitorder="little").view(np.uint32), 32)[: block.threads]


def _check_mask(block: Block, lanes: np.ndarray, mask: np.ndarray) -> None:
    """The mask that a thread gives must be that of the lanes that are here with it."""
    if (_by_warp(block, lanes)[lanes] != mask[lanes]).any():
        raise PtxError("the mask does not match the lanes that are here")
