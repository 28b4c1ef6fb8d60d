# SPDX-License-Identifier: Apache-2.0
"""Safetensors files read and written piece by piece, with no more memory than the pieces.

The safetensors library maps a file and hands out whole tensors, and writes only what is in memory; here ``pread`` and ``pwrite``
work on buffers of the caller's. Everything that a file says of itself is checked when it is opened (:mod:`.header`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor
from typing_extensions import Self

from ..program.errors import FileError
from .header import MOST_HEADER_BYTES, Malformed, TensorInfo, lay_out, parse

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_PIECE = 1 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HOW_TO_CONVERT = (
    "pickles can run code and are not read: load it once with transformers or PEFT and save it again with "
    "save_pretrained, which writes safetensors"
)


class SafetensorsFile:
    """An open safetensors file: ``tensors`` by name in the order of their bytes, and ``metadata``.

    Raises:
        FileError: it cannot be read, or is not a whole safetensors file; one sentence with the file and what is wrong.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.suffix in PICKLES:
            raise FileError(f"{path}: {HOW_TO_CONVERT}")
        try:
            # Without waiting: a named pipe would keep the program until somebody writes into it.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror}") from error
        try:
            self.size, self.stamp = _measured(self.fd, path)
            self.tensors, self.metadata = self._read_header()
        except BaseException:
            os.close(self.fd)
            raise

    def read_into(self, at: int, buffer: Any) -> None:
        """Fills ``buffer`` (writable, contiguous) with the bytes from ``at``, counted from the file's beginning."""
        left = memoryview(buffer).cast("B")
        while left:
            try:
                count = os.preadv(self.fd, [left], at)
            except OSError as error:
                raise FileError(f"{self.path} cannot be read: {error.strerror}") from error
            if count == 0:
                raise FileError(f"{self.path} has become shorter while it was read: expected bytes at {at:,}")
            left, at = left[count:], at + count

    def read(self, name: str) -> Tensor:
        """The tensor of that name, in memory of its own."""
        info = self.tensors[name]
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise FileError(f"{self.path}: {name} has dtype {info.dtype}: expected one of {', '.join(TORCH_DTYPES)}")
        tensor = torch.empty(info.shape, dtype=dtype)
        if info.nbytes:
            self.read_into(info.begin, tensor.reshape(-1).view(torch.uint8).numpy())
        return tensor

    def is_same(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Whether two tensors have the same dtype, shape and bytes."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        for at in range(0, one.nbytes, _PIECE):
            count = min(_PIECE, one.nbytes - at)
            first, second = bytearray(count), bytearray(count)
            self.read_into(one.begin + at, first)
            self.read_into(other.begin + at, second)
            if first != second:
                return False
        return True

    def is_finite(self, info: TensorInfo) -> bool:
        """Whether a floating-point tensor holds neither NaN nor infinity."""
        buffer = torch.empty(min(_PIECE, info.nbytes), dtype=torch.uint8)
        for at in range(0, info.nbytes, _PIECE):
            piece = buffer[: info.nbytes - at]
            self.read_into(info.begin + at, piece.numpy())
            if not torch.isfinite(piece.view(TORCH_DTYPES[info.dtype])).all():
                return False
        return True

    def check_unchanged(self) -> None:
        """Raises a FileError where the file has been written to since it was opened."""
        if _measured(self.fd, self.path)[1] != self.stamp:
            refuse_changed(self.path)

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        if self.size < 8:
            raise FileError(f"{self.path} has {self.size} bytes: expected a safetensors file, which has at least 8")
        prefix = bytearray(8)
        self.read_into(0, prefix)
        length = int.from_bytes(prefix, "little")
        if length > self.size - 8:
            raise FileError(
                f"{self.path} is no whole safetensors file: expected a header that ends in the file's {self.size:,} bytes, got one of "
                f"{length:,}"
            )
        _check_header(self.path, length)
        text = bytearray(length)
        self.read_into(8, text)
        try:
            return parse(bytes(text), 8 + length, self.size)
        except Malformed as error:
            raise FileError(f"{self.path} {error}: expected a safetensors file as it was written") from None


class SafetensorsWriter:
    """A safetensors file written in pieces: the header first, from names, dtypes and shapes, then bytes anywhere.

    The caller stages: ``path`` is a name under which nobody looks for a whole file. What is there is overwritten.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]):
        self.path = path
        self.header, self.tensors = lay_out(tensors, metadata)
        _check_header(path, len(self.header) - 8)
        self.size = max((tensor.end for tensor in self.tensors.values()), default=len(self.header))
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            self.write(0, self.header)
        except BaseException:
            os.close(self.fd)
            raise

    def write(self, at: int, data: Any) -> None:
        """Writes ``data`` (contiguous) to the bytes from ``at``, counted from the file's beginning."""
        left = memoryview(data).cast("B")
        while left:
            count = os.pwritev(self.fd, [left], at)
            left, at = left[count:], at + count

    def finish(self) -> None:
        """Returns when the file is on the disk."""
        os.ftruncate(self.fd, self.size)
        os.fsync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


def _check_header(path: Path, length: int) -> None:
    """What is written can be read again."""
    if length > MOST_HEADER_BYTES:
        raise FileError(
            f"{path}: its list of tensors takes {length:,} bytes: expected a header of at most {MOST_HEADER_BYTES:,}, so keep the "
            "tensors in more files"
        )


def refuse_changed(path: Path) -> NoReturn:
    raise FileError(f"{path} was changed while it was read: run the command again when it is at rest")


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """What differs once a file was written to, replaced or touched, though not always the other way round."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _measured(fd: int, path: Path) -> tuple[int, tuple[int, ...]]:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is not a file: expected one, and no folder, pipe or device")
    return status.st_size, stamp_of(status)
