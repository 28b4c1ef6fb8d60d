# SPDX-License-Identifier: Apache-2.0
"""Calls launchers of an emulated library from Python."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import numpy as np

ORDERS = ("fifo", "lifo", "random")
COPIES = ("lazy", "eager", "random")


class EmulatorError(Exception):
    """A launch failed, or the emulator was asked for what is not there."""


class Bytes(NamedTuple):
    """What kernels read and wrote of a buffer."""

    read: int
    written: int


class Statistics(NamedTuple):
    """Of all launches since the last clear."""

    wavefronts: int
    least_wavefronts: int
    mma: int
    shared_bytes: int


class Launched(NamedTuple):
    """A launch as it can be repeated: the kernel by its mangled name, arguments by their bytes."""

    symbol: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    dynamic_bytes: int
    arguments: list[bytes]


class Library:
    """A library of ``compilers.emulated_library``; its emulator is its own."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.gralora_emulator_error.restype = ctypes.c_char_p
        self._library.gralora_emulator_launches.restype = ctypes.c_int64
        self._library.gralora_emulator_launch_name.restype = ctypes.c_char_p
        self._library.gralora_emulator_launch_symbol.restype = ctypes.c_char_p
        self._library.gralora_emulator_launch_argument.restype = ctypes.c_int64

    def _check(self, failed: int) -> None:
        if failed != 0:
            raise EmulatorError(self._library.gralora_emulator_error().decode())

    def configure(self, order: str = "random", seed: int = 1, copies: str = "lazy") -> None:
        numbers = ORDERS.index(order), ctypes.c_uint64(seed), COPIES.index(copies)
        self._check(self._library.gralora_emulator_configure(*numbers))

    def device(self, capability: int = 80, multiprocessors: int = 108) -> None:
        self._check(self._library.gralora_emulator_device(capability, multiprocessors))

    def truncate(self, truncates: bool) -> None:
        """Whether mma adds as the tensor cores of the device's capability do, or in double."""
        self._library.gralora_emulator_truncate(int(truncates))

    def multiply_add(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """``c + sum_k a_k b_k`` as those tensor cores add it; a and b: float64, c: float32."""
        d = np.empty_like(c)
        sizes = ctypes.c_int64(c.size), a.shape[-1]
        self._library.gralora_emulator_multiply_add(*(_pointer(array) for array in (a, b, c, d)), *sizes)
        return d

    def register(self, **buffers: np.ndarray) -> None:
        for name, array in buffers.items():
            size = ctypes.c_int64(array.nbytes)
            self._check(self._library.gralora_emulator_register(name.encode(), _pointer(array), size))

    def clear(self) -> None:
        self._library.gralora_emulator_clear()

    def traffic(self, name: str) -> Bytes:
        counts = (ctypes.c_int64 * 2)()
        self._check(self._library.gralora_emulator_traffic(name.encode(), counts))
        return Bytes(*counts)

    def launches(self) -> list[str]:
        count = self._library.gralora_emulator_launches()
        return [self._library.gralora_emulator_launch_name(ctypes.c_int64(i)).decode() for i in range(count)]

    def launched(self) -> list[Launched]:
        return [self._launched(ctypes.c_int64(i)) for i in range(len(self.launches()))]

    def _launched(self, launch: ctypes.c_int64) -> Launched:
        symbol = self._library.gralora_emulator_launch_symbol(launch).decode()
        shape = (ctypes.c_int64 * 8)()
        self._library.gralora_emulator_launch_shape(launch, shape)
        arguments = []
        for i in range(shape[7]):
            data = ctypes.c_void_p()
            size = self._library.gralora_emulator_launch_argument(launch, ctypes.c_int64(i), ctypes.byref(data))
            arguments.append(ctypes.string_at(data, size))
        return Launched(symbol, tuple(shape[:3]), tuple(shape[3:6]), shape[6], arguments)

    def statistics(self) -> Statistics:
        counts = (ctypes.c_int64 * 4)()
        self._library.gralora_emulator_statistics(counts)
        return Statistics(*counts)

    def number(self, function: str, *arguments: object) -> int:
        """What an extern "C" function returns, an int64."""
        called = self._library[function]
        called.restype = ctypes.c_int64
        return called(*arguments)

    def launch(self, launcher: str, *arguments: np.ndarray | int | bytes) -> None:
        """Calls an extern "C" launcher that returns 0 or an error; arrays are passed as pointers to their elements."""
        passed = [_pointer(a) if isinstance(a, np.ndarray) else a for a in arguments]
        self._check(self._library[launcher](*passed))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} and strides {array.strides} is not contiguous")
    return ctypes.c_void_p(array.ctypes.data)
