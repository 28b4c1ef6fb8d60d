# SPDX-License-Identifier: Apache-2.0
"""ldmatrix and mma, with the fragments' layouts as CUTLASS states them: the emulator takes them from the PTX ISA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .parser import members
from .registry import opcode
from .tensor_core import multiply_add
from .types import bf16_to_f32

if TYPE_CHECKING:
    from .interpreter import Block
    from .parser import Instruction

Modes = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


@dataclass(frozen=True)
class Layout:
    """Where in a matrix of ``rows`` rows, stored by columns, lane and register element (both taken apart) lie."""

    lanes: Modes
    elements: Modes
    rows: int

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """[32, elements]: rows and columns."""
        flat = _offsets(self.lanes)[:, None] + _offsets(self.elements)[None, :]
        return flat % self.rows, flat // self.rows


def _offsets(modes: Modes) -> np.ndarray:
    """The first mode counts fastest."""
    shape, strides = modes
    grids = np.meshgrid(*(np.arange(size) * stride for size, stride in zip(shape, strides, strict=True)), indexing="ij")
    return sum(grids).ravel(order="F")


# Of D[16, 8] = C + A[16, DEPTH] B[8, DEPTH]^T (cute/atom/mma_traits_sm80.hpp), for B transposed.
DEPTH = 16
A_LAYOUT = Layout(((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128)), 16)
B_LAYOUT = Layout(((4, 8), (16, 1)), ((2, 2), (8, 64)), 8)
C_LAYOUT = Layout(((4, 8), (32, 1)), ((2, 2), (16, 8)), 16)


@opcode("mma")
def multiply(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """``mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 d, a, b, c``.

    The sum is formed in double and rounded once, or as the tensor cores of ``block.tensor_core`` do it.
    """
    if instruction.modifiers[2:] != ("m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"):
        raise NotImplementedError(instruction.text)
    d, *inputs = (members(operand) for operand in instruction.operands)
    a, b, c = (np.stack([block.get(name, "b32") for name in names], axis=1) for names in inputs)
    a, b = (bf16_to_f32(registers.view(np.uint16)) for registers in (a, b))
    c = c.view(np.float32)
    results = np.zeros((block.threads, len(d)), np.float32)
    for warp in block.whole_warps(lanes):
        threads = slice(32 * warp, 32 * warp + 32)
        A = np.zeros((16, DEPTH))
        B = np.zeros((8, DEPTH))
        C = np.zeros((16, 8))
        A[A_LAYOUT.places()] = a[threads]
        B[B_LAYOUT.places()] = b[threads]
        C[C_LAYOUT.places()] = c[threads]
        core = block.tensor_core
        D = C + A @ B.T if core is None else multiply_add(A[:, None, :], B[None, :, :], C.astype(np.float32), core)
        results[threads] = D[C_LAYOUT.places()]
    for i, name in enumerate(d):
        block.put(name, np.ascontiguousarray(results[:, i]), lanes)


@opcode("ldmatrix")
def load_matrices(block: Block, instruction: Instruction, lanes: np.ndarray) -> None:
    """Lanes 8 i to 8 i + 7 name the rows of matrix i; lane t gets the t-th pair of its elements."""
    if "m8n8" not in instruction.modifiers or instruction.type != "b16":
        raise NotImplementedError(instruction.text)
    block.whole_warps(lanes)
    results = members(instruction.operands[0])
    named = lanes & (block.lane < 8 * len(results))
    rows = block.load("shared", block.address(instruction.operands[1]), 16, named)
    rows = rows.view(np.uint16).reshape(-1, 32, 8)
    for i, name in enumerate(results):
        matrices = rows[:, 8 * i : 8 * i + 8]
        if "trans" in instruction.modifiers:
            matrices = matrices.transpose(0, 2, 1)
        block.put(name, np.ascontiguousarray(matrices).view(np.uint32).ravel(), lanes)
