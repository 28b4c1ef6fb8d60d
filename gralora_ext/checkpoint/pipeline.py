# SPDX-License-Identifier: Apache-2.0
"""Reading, merging, hashing and writing at the same time, each in a thread of its own, with a fixed number of buffers.

``pread``, ``pwrite``, SHA-256 and the kernels all work without Python's lock. The threads hand each other pieces of 1 MiB, so
that memory does not grow with the model, nor with a tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from .plan import Job, Shard
from .safetensors_file import TORCH_DTYPES, SafetensorsFile, SafetensorsWriter, refuse_changed
from .strips import merge_strip_

PIECE = 1 << 20
BUFFERS, AHEAD = 16, 6
_WRITEBACK = 16 << 20


class Piece(NamedTuple):
    """``rows`` rows from ``row`` and ``columns`` columns from ``column`` of a tensor's elements, contiguous in its file."""

    job: Job
    row: int
    rows: int
    column: int
    columns: int
    first: int  # the first element's place among all of the tensor
    item_size: int  # bytes of an element in the source


class RunningHash:
    """The SHA-256 of a file that is seen in pieces, as long as they come in the file's order; the rest is read at the end."""

    def __init__(self) -> None:
        self.value = hashlib.sha256()
        self.at = 0

    def feed(self, at: int, data: Any) -> None:
        if at == self.at:
            self.value.update(data)
            self.at += memoryview(data).nbytes

    def catch_up(self, fd: int, end: int) -> None:
        while self.at < end:
            data = os.pread(fd, min(1 << 20, end - self.at), self.at)
            if not data:
                return
            self.feed(self.at, data)


class Pipeline:
    """Writes shards; ``hashes`` are those of the base's files, by path, as far as they have been read.

    ``progress`` is called with the bytes written so far of each piece.
    """

    def __init__(self, hashes: dict[Path, RunningHash], progress: Callable[[int], None]):
        self.hashes = hashes
        self.progress = progress
        self._threads = [ThreadPoolExecutor(1, f"merge-{name}") for name in ("read", "write", "hash")]
        self._reader, self._writer, self._hasher = self._threads
        self._free = deque(torch.empty(PIECE, dtype=torch.uint8) for _ in range(BUFFERS))
        self._reads: deque[tuple[Piece, Tensor, Future[None]]] = deque()
        self._writes: deque[tuple[Tensor, list[Future[None]]]] = deque()
        self._files: dict[Path, SafetensorsFile] = {}
        self._loaded: tuple[Job, list[dict[str, Tensor]]] | None = None

    def write(self, shard: Shard, path: Path) -> str:
        """Writes a shard to ``path``, on the disk when this returns, and gives its SHA-256."""
        own = RunningHash()
        jobs = {job.name: job for job in shard.jobs}
        writer = SafetensorsWriter(path, [(job.name, job.dtype, job.shape) for job in shard.jobs], shard.metadata)
        with ExitStack() as stack:
            stack.callback(writer.close)
            stack.callback(self._settle)
            own.feed(0, writer.header)
            for name in writer.tensors:
                for piece in pieces(jobs[name]):
                    buffer = self._buffer()
                    self._reads.append((piece, buffer, self._reader.submit(self._read, piece, buffer)))
                    if len(self._reads) > AHEAD:
                        self._merge_next(writer, own)
            while self._reads:
                self._merge_next(writer, own)
            while self._writes:
                self._free.append(self._written())
            for file in self._files.values():
                file.check_unchanged()
            writer.finish()
            own.catch_up(writer.fd, writer.size)
        return own.value.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    def _settle(self) -> None:
        """After a failure, no thread works on the file any more; otherwise there is nothing left to wait for."""
        waited = [*(future for *_, future in self._reads), *(f for _, futures in self._writes for f in futures)]
        for future in waited:
            future.cancel()
        for future in waited:
            if not future.cancelled():
                future.exception()
        self._reads.clear()
        self._writes.clear()
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._loaded = None

    def _buffer(self) -> Tensor:
        return self._free.popleft() if self._free else self._written()

    def _written(self) -> Tensor:
        buffer, futures = self._writes.popleft()
        for future in futures:
            future.result()
        return buffer

    def _read(self, piece: Piece, buffer: Tensor) -> None:
        source = piece.job.source
        file = self._files.get(source.path)
        running = self.hashes.get(source.path)
        if file is None:
            file = SafetensorsFile(source.path)
            self._files[source.path] = file
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            if file.stamp != source.stamp:
                refuse_changed(source.path)
            if running is not None:
                running.catch_up(file.fd, min(file.size, source.info.begin) if running.at == 0 else running.at)
        begin = source.info.begin + piece.first * piece.item_size
        data = buffer[: piece.rows * piece.columns * piece.item_size].numpy()
        file.read_into(begin, data)
        if running is not None:
            running.feed(begin, data)

    def _merge_next(self, writer: SafetensorsWriter, own: RunningHash) -> None:
        piece, buffer, future = self._reads.popleft()
        self._writes.append((buffer, []))  # the buffer is not lost if what follows fails
        future.result()
        job = piece.job
        data = self._merged(piece, buffer[: piece.rows * piece.columns * piece.item_size]).numpy()
        info = writer.tensors[job.name]
        at = info.begin + piece.first * (info.nbytes // max(1, info.numel))
        self._writes[-1][1].extend(
            (self._writer.submit(_write, writer, at, data), self._hasher.submit(own.feed, at, data))
        )
        self.progress(data.nbytes)

    def _merged(self, piece: Piece, data: Tensor) -> Tensor:
        """The bytes of a piece of the result, in the buffer of ``data`` where their dtype is the source's."""
        job = piece.job
        if job.is_copy:
            return data
        computed = TORCH_DTYPES[job.computed]
        typed = data.view(TORCH_DTYPES[job.source.info.dtype]).to(computed)
        strip = typed.view(piece.rows, piece.columns)
        for addition, weights in zip(job.additions, self._weights(job), strict=True):
            merge_strip_(strip, piece.row, piece.column, weights, addition.scaling, addition.fan_in_fan_out)
        return typed.to(TORCH_DTYPES[job.dtype]).view(torch.uint8)

    def _weights(self, job: Job) -> list[dict[str, Tensor]]:
        """What the adapters have for a weight; those of the weight before are freed first."""
        if self._loaded is None or self._loaded[0] is not job:
            self._loaded = None
            self._loaded = (job, [addition.layer.stored() for addition in job.additions])
        return self._loaded[1]


def pieces(job: Job) -> Iterator[Piece]:
    """A tensor in pieces whose source, sum and result each fit into a buffer: whole rows where an adapter is added, if one fits."""
    info = job.source.info
    item_size = info.nbytes // max(1, info.numel)
    sizes = [item_size] if job.is_copy else [TORCH_DTYPES[d].itemsize for d in (info.dtype, job.computed, job.dtype)]
    most = PIECE // max(1, *sizes)
    rows, columns = job.shape if job.additions else (1, info.numel)
    if columns <= most and job.additions:
        at_once = most // max(1, columns)
        for row in range(0, rows, at_once):
            yield Piece(job, row, min(at_once, rows - row), 0, columns, row * columns, item_size)
        return
    width = -(-columns // -(-columns // most)) if columns else 1  # parts of nearly one size
    for row in range(rows):
        for column in range(0, columns, width):
            yield Piece(job, row, 1, column, min(width, columns - column), row * columns + column, item_size)


def _write(writer: SafetensorsWriter, at: int, data: Any) -> None:
    writer.write(at, data)
    # The disk begins with what is written now, and not with all of it at the end.
    end = at + data.nbytes
    if at // _WRITEBACK != end // _WRITEBACK:
        begin = max(0, end - end % _WRITEBACK - _WRITEBACK)
        os.posix_fadvise(writer.fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
