# SPDX-License-Identifier: Apache-2.0
"""Global buffers and a block's shared memory, with the checks of every access."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import PtxError

# Where shared memory lies among generic addresses.
SHARED_BASE = 1 << 48
NOBODY = -1
SEVERAL = -2


@dataclass
class Piece:
    """Lanes whose accesses fall in the same buffer, and their offsets in it."""

    data: np.ndarray  # uint8
    lanes: np.ndarray
    offsets: np.ndarray

    def bytes(self, size: int) -> np.ndarray:
        """[lanes, size]: indices of the bytes."""
        return self.offsets[:, None] + np.arange(size)


class GlobalMemory:
    """Each array that is uploaded is its own memory, with nothing valid around it."""

    _FIRST = 0x10000
    _GAP = 0x10000
    _ALIGNMENT = 256

    def __init__(self) -> None:
        self._buffers: list[tuple[int, np.ndarray]] = []
        self._next = self._FIRST

    def upload(self, array: np.ndarray, address: int | None = None) -> int:
        """At an address of the caller's, or where there is room."""
        if not array.flags.c_contiguous:
            raise ValueError(f"an array of shape {array.shape} and strides {array.strides} is not contiguous")
        if address is None:
            address = self._next
        elif any(address < base + len(data) and base < address + array.nbytes for base, data in self._buffers):
            raise ValueError(f"there is a buffer at {address:#x}")
        self._buffers.append((address, array.reshape(-1).view(np.uint8)))
        end = max(self._next, address + array.nbytes + self._GAP)
        self._next = -(-end // self._ALIGNMENT) * self._ALIGNMENT
        return address

    def find(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> list[Piece]:
        pieces = []
        left = np.ones(len(lanes), bool)
        for base, data in self._buffers:
            here = left & (addresses >= base) & (addresses + size <= base + len(data))
            if here.any():
                pieces.append(Piece(data, lanes[here], addresses[here] - base))
                left &= ~here
        if left.any():
            raise PtxError(f"global access of {size} bytes out of bounds by thread {lanes[left][0]}")
        return pieces


class ParameterMemory:
    """A launch's arguments, each at an address of its own among those of the parameter space."""

    _ROOM = 0x10000

    def __init__(self, arguments: dict[str, bytes]) -> None:
        self.addresses = {name: i * self._ROOM for i, name in enumerate(arguments)}
        self._sizes = np.array([len(data) for data in arguments.values()], np.int64)
        self._data = np.frombuffer(b"".join(data.ljust(self._ROOM, b"\0") for data in arguments.values()), np.uint8)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """[addresses, size] bytes."""
        which, offsets = addresses // self._ROOM, addresses % self._ROOM
        outside = (which < 0) | (which >= len(self._sizes))
        if outside.any() or (offsets + size > self._sizes[which]).any():
            raise PtxError("parameter access out of bounds")
        if (addresses % size).any():
            raise PtxError(f"misaligned access of {size} bytes to a parameter")
        return self._data[addresses[:, None] + np.arange(size)]


class SharedMemory:
    """Knows which bytes have been written, and between two barriers who wrote and read each."""

    def __init__(self, size: int, races: bool) -> None:
        self.data = np.full(size, 0xFF, np.uint8)
        self._written = np.zeros(size, bool)
        self._races = races
        self._writer = np.full(size, NOBODY, np.int32)
        self._reader = np.full(size, NOBODY, np.int32)

    def find(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> Piece:
        outside = (addresses < 0) | (addresses + size > len(self.data))
        if outside.any():
            raise PtxError(f"shared access of {size} bytes out of bounds by thread {lanes[outside][0]}")
        return Piece(self.data, lanes, addresses)

    def note_read(self, piece: Piece, size: int) -> None:
        where = piece.bytes(size).ravel()
        who = np.repeat(piece.lanes, size)
        if not self._written[where].all():
            raise PtxError(f"thread {who[~self._written[where]][0]} reads uninitialised shared memory")
        if not self._races:
            return
        self._check_unordered(self._writer[where], who, "write then read")
        before = self._reader[where]
        self._reader[where] = np.where((before == NOBODY) | (before == who), who, SEVERAL)
        self._reader[where[self._reader[where] != who]] = SEVERAL

    def note_write(self, piece: Piece, size: int) -> None:
        self._written[piece.bytes(size).ravel()] = True
        self.note_copy(piece, size)

    def note_copy(self, piece: Piece, size: int) -> None:
        """An asynchronous copy: a write at any time until its wait, whose bytes are not there yet."""
        if not self._races:
            return
        where = piece.bytes(size).ravel()
        who = np.repeat(piece.lanes, size)
        self._check_unordered(self._writer[where], who, "write then write")
        self._check_unordered(self._reader[where], who, "read then write")
        self._writer[where] = who
        if (self._writer[where] != who).any():
            raise PtxError("shared memory race: two threads write at once")

    def _check_unordered(self, before: np.ndarray, who: np.ndarray, what: str) -> None:
        other = (before != NOBODY) & (before != who)
        if other.any():
            raise PtxError(f"shared memory race: {what}, by thread {who[other][0]}")

    def barrier(self) -> None:
        self._writer[:] = NOBODY
        self._reader[:] = NOBODY

    def warp_barrier(self, warp: int) -> None:
        """Orders what the warp's own threads did."""
        for who in (self._writer, self._reader):
            who[(who >= 0) & (who // 32 == warp)] = NOBODY
