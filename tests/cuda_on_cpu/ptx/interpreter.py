# SPDX-License-Identifier: Apache-2.0
"""Launches kernels block by block.

The threads of a block are one numpy vector. Those with the lowest program counter run first, which brings together
again what branches parted.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxError
from .memory import SHARED_BASE, GlobalMemory, ParameterMemory, Piece, SharedMemory
from .parser import Instruction, Kernel, Parameter, parse
from .registry import OPCODES
from .tensor_core import TensorCore
from .types import TYPES, UNSIGNED, unsigned

if TYPE_CHECKING:
    from .opcodes_memory import Copy

Argument = int | float | bytes | ctypes.Structure


class Gpu:
    """The kernels of PTX texts and the global memory that they share.

    ``tensor_core``: how mma adds; None: in double, rounded once.
    """

    def __init__(self, *ptx: str, tensor_core: TensorCore | None = None) -> None:
        self.kernels = {name: kernel for text in ptx for name, kernel in parse(text).items()}
        self.tensor_core = tensor_core
        self.memory = GlobalMemory()

    def upload(self, array: np.ndarray, address: int | None = None) -> int:
        """The address of a buffer that is this array: what kernels write is seen in it."""
        return self.memory.upload(array, address)

    def clear(self) -> None:
        """Forgets all buffers."""
        self.memory = GlobalMemory()

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Argument],
        *,
        dynamic_bytes: int = 0,
        races: bool = True,
    ) -> None:
        """Runs ``name``; a structure by value is given as its bytes. ``races``: look for races in shared memory."""
        kernel = self.kernels[name]
        grid = (*grid, 1, 1)[:3]
        block = (*block, 1, 1)[:3]
        pairs = zip(kernel.parameters, arguments, strict=True)
        parameters = ParameterMemory({parameter.name: _parameter_bytes(parameter, a) for parameter, a in pairs})
        for z, y, x in itertools.product(*(range(size) for size in reversed(grid))):
            shared = SharedMemory(kernel.static_bytes + dynamic_bytes, races)
            Block(kernel, self.memory, shared, parameters, grid, block, (x, y, z), self.tensor_core).run()


def _parameter_bytes(parameter: Parameter, argument: Argument) -> bytes:
    if isinstance(argument, (bytes, ctypes.Structure)):
        data = bytes(argument)
    else:
        data = np.asarray(argument).astype(parameter.dtype).tobytes()
    if len(data) != parameter.dtype.itemsize * parameter.count:
        raise ValueError(f"{parameter.name} takes {parameter.dtype.itemsize * parameter.count} bytes, not {len(data)}")
    return data


class Block:
    """The state of one block's threads, and how opcodes get at it."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        shared: SharedMemory,
        parameters: ParameterMemory,
        grid: Sequence[int],
        size: Sequence[int],
        index: Sequence[int],
        tensor_core: TensorCore | None,
    ) -> None:
        self.kernel = kernel
        self.tensor_core = tensor_core
        self.memory = memory
        self.shared = shared
        self.parameters = parameters
        self.index = tuple(index)
        self.threads = int(np.prod(size))
        self.lane = np.arange(self.threads) % 32
        self.registers = {name: np.zeros(self.threads, dtype) for name, dtype in kernel.registers.items()}
        self.special = self._special_registers(grid, size)
        self.counter = np.zeros(self.threads, np.int64)
        self.returned = np.zeros(self.threads, bool)
        self.waiting = np.zeros(self.threads, bool)
        # Of cp.async: what has not landed, and how many groups each thread has committed.
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.threads, np.int64)

    def _special_registers(self, grid: Sequence[int], size: Sequence[int]) -> dict[str, np.ndarray]:
        linear = np.arange(self.threads)
        values = {
            "%tid.x": linear % size[0],
            "%tid.y": linear // size[0] % size[1],
            "%tid.z": linear // size[0] // size[1],
            "%laneid": self.lane,
            "%warpid": linear // 32,
        }
        for name, triple in (("%ctaid", self.index), ("%ntid", size), ("%nctaid", grid)):
            for axis, value in zip("xyz", triple, strict=True):
                values[f"{name}.{axis}"] = np.full(self.threads, value)
        return {name: value.astype(np.uint32) for name, value in values.items()}

    def run(self) -> None:
        code = self.kernel.code
        with np.errstate(all="ignore"):
            while True:
                running = ~self.returned & ~self.waiting
                if not running.any():
                    if not self.waiting.any():
                        return
                    self._leave_barrier()
                    continue
                counter = int(self.counter[running].min())
                lanes = running & (self.counter == counter)
                if counter >= len(code):
                    self.returned |= lanes
                    continue
                self.counter[lanes] = counter + 1
                self._step(code[counter], lanes)

    def _step(self, instruction: Instruction, lanes: np.ndarray) -> None:
        if instruction.predicate is not None:
            lanes = lanes & (self.registers[instruction.predicate] ^ instruction.negated)
            if not lanes.any():
                return
        handler = OPCODES.get(instruction.opcode)
        if handler is None:
            raise NotImplementedError(instruction.text)
        try:
            handler(self, instruction, lanes)
        except PtxError as error:
            where = f"{self.kernel.name} block {self.index} at `{instruction.text}`"
            raise PtxError(f"{where}: {error}") from None

    def _leave_barrier(self) -> None:
        if self.returned.any():
            raise PtxError(f"{self.kernel.name} block {self.index}: barrier after threads have returned")
        self.waiting[:] = False
        self.shared.barrier()
        for copy in self.copies:
            copy.note(self)

    # Operands

    def get(self, operand: str, ptx_type: str) -> np.ndarray:
        """[threads]: a register, a special one, the address of a shared array or a parameter, or a constant."""
        dtype = TYPES[ptx_type]
        if operand in self.registers:
            value = self.registers[operand]
        elif operand in self.special:
            value = self.special[operand]
        else:
            value = np.full(self.threads, self._constant(operand, dtype))
        if value.dtype == dtype:
            return value
        if value.itemsize != dtype.itemsize:
            value = value.astype(unsigned(dtype))
        return value.view(dtype)

    def _constant(self, operand: str, dtype: np.dtype) -> np.generic:
        if operand in self.kernel.shared:
            return UNSIGNED[8].type(self.kernel.shared[operand])
        if operand in self.parameters.addresses:
            return UNSIGNED[8].type(self.parameters.addresses[operand])
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return UNSIGNED[4].type(int(f"0x{operand[2:]}", 0))
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
            return UNSIGNED[8].type(int(f"0x{operand[2:]}", 0))
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            raise NotImplementedError(f"operand {operand}")
        bits = int(operand.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
        return unsigned(dtype).type(bits)

    def put(self, operand: str, value: np.ndarray, lanes: np.ndarray) -> None:
        """A narrower value is extended by its sign, or by zeros."""
        if operand == "_":
            return
        register = self.registers[operand]
        if value.dtype.kind == "f":
            value = value.view(unsigned(value.dtype))
        register[lanes] = value[lanes].astype(register.dtype)

    def address(self, operand: str) -> np.ndarray:
        """[threads]: of ``[register + offset]``."""
        parts = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        return self.get(parts[1], "u64").astype(np.int64) + int(parts[2] or "0", 0)

    # Memory

    def pieces(self, space: str, addresses: np.ndarray, size: int, lanes: np.ndarray) -> list[Piece]:
        """Checks what ``lanes`` access at ``addresses`` and says where it lies."""
        active = np.flatnonzero(lanes)
        addresses = addresses[active]
        if (addresses % size).any():
            raise PtxError(f"misaligned access of {size} bytes by thread {active[addresses % size != 0][0]}")
        if space == "generic":
            in_shared = addresses >= SHARED_BASE
            if in_shared.any() and not in_shared.all():
                raise NotImplementedError("one access to both global and shared memory")
            space = "shared" if in_shared.any() else "global"
            addresses = addresses - SHARED_BASE * in_shared
        if space == "shared":
            return [self.shared.find(active, addresses, size)]
        return self.memory.find(active, addresses, size)

    def load(self, space: str, addresses: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        """[threads, size] bytes."""
        loaded = np.zeros((self.threads, size), np.uint8)
        for piece in self.pieces(space, addresses, size, lanes):
            if piece.data is self.shared.data:
                self.shared.note_read(piece, size)
            loaded[piece.lanes] = piece.data[piece.bytes(size)]
        return loaded

    def store(self, space: str, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        """values: [threads, size] bytes."""
        size = values.shape[1]
        for piece in self.pieces(space, addresses, size, lanes):
            if piece.data is self.shared.data:
                self.shared.note_write(piece, size)
            piece.data[piece.bytes(size)] = values[piece.lanes]

    def whole_warps(self, lanes: np.ndarray) -> np.ndarray:
        """The numbers of the warps that are here, all of them whole."""
        padded = np.concatenate([lanes, np.zeros(-self.threads % 32, bool)]).reshape(-1, 32)
        if (padded.any(1) & ~padded.all(1)).any():
            raise PtxError("a part of a warp")
        return np.flatnonzero(padded.all(1))
