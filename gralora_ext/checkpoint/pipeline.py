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

from .jobs import Job, Shard
from .safetensors_file import TORCH_DTYPES, SafetensorsFile, SafetensorsWriter, refuse_changed
from .strips import merge_strip_

PIECE = 1 << 20
BUFFERS = 12  # pairs
MERGERS = 8  # more would wait for the threads that hash
_LOADED_BYTES = 8 << 20  # of adapters, for all weights under way, where that is more than one
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

    A piece is read, then merged, then written and hashed; each of these waits for the one before in a thread of its own. Pieces
    are merged by several threads at once, each alone: OpenMP's threads would spin where the others have work to do.
    ``progress`` is called with the bytes of each piece that has been written.
    """

    def __init__(self, hashes: dict[Path, RunningHash], progress: Callable[[int], None]):
        self.hashes = hashes
        self.progress = progress
        self._threads_before = torch.get_num_threads()
        self._reader, self._writer, self._hasher = (
            ThreadPoolExecutor(1, f"merge-{name}") for name in ("read", "write", "hash")
        )
        self._merger = ThreadPoolExecutor(min(self._threads_before, MERGERS), "merge", torch.set_num_threads, (1,))
        # The second of a pair is for another dtype than the file's. Where there is none, its memory
        # is never touched, and so never taken.
        self._free = deque(torch.empty((2, PIECE), dtype=torch.uint8) for _ in range(BUFFERS))
        self._flights: deque[tuple[Tensor, int, list[Future[Any]]]] = deque()
        self._files: dict[Path, SafetensorsFile] = {}
        self._loaded_bytes = 0

    def write(self, shard: Shard, path: Path) -> str:
        """Writes a shard to ``path``, on the disk when this returns, and gives its SHA-256."""
        own = RunningHash()
        jobs = {job.name: job for job in shard.jobs}
        writer = SafetensorsWriter(path, [(job.name, job.dtype, job.shape) for job in shard.jobs], shard.metadata)
        with ExitStack() as stack:
            stack.callback(writer.close)
            stack.push(self._settle)
            own.feed(0, writer.header)
            for name, info in writer.tensors.items():
                weights: list[dict[str, Tensor]] = []  # those of the weight before are freed first
                weights = self._weights(jobs[name])
                for piece in pieces(jobs[name]):
                    self._send(piece, weights, writer, info.begin, own)
            self._land(0)
            for file in self._files.values():
                file.check_unchanged()
            writer.finish()
            own.catch_up(writer.fd, writer.size)
        return own.value.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        torch.set_num_threads(self._threads_before)

    def _stop(self) -> None:
        """No thread does anything any more when this returns; what none has begun is dropped."""
        for thread in (self._reader, self._merger, self._writer, self._hasher):
            thread.shutdown(cancel_futures=True)

    def _send(
        self, piece: Piece, weights: list[dict[str, Tensor]], writer: SafetensorsWriter, begin: int, own: RunningHash
    ) -> None:
        if not self._free:
            self._land(len(self._flights) - 1)
        buffer = self._free.popleft()
        item_size = piece.item_size if piece.job.is_copy else TORCH_DTYPES[piece.job.dtype].itemsize
        at = begin + piece.first * item_size
        read = self._reader.submit(self._read, piece, buffer[0])
        merged = self._merger.submit(_merged, piece, buffer, read, weights)
        written = self._writer.submit(lambda: _write(writer, at, merged.result()))
        hashed = self._hasher.submit(lambda: own.feed(at, merged.result()))
        self._flights.append((buffer, piece.rows * piece.columns * item_size, [read, merged, written, hashed]))

    def _land(self, most: int) -> None:
        """Waits until at most so many pieces are under way; what failed in a thread is raised here."""
        while len(self._flights) > most:
            buffer, size, futures = self._flights[0]
            for future in futures:
                future.result()
            self._flights.popleft()
            self._free.append(buffer)
            self.progress(size)

    def _settle(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes the files that were read. After a failure, which may have come anywhere, the threads are stopped first."""
        if kind is not None:
            self._stop()
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._loaded_bytes = 0

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
            if running is not None and running.at == 0:
                running.catch_up(file.fd, source.info.begin)
        begin = source.info.begin + piece.first * piece.item_size
        data = buffer[: piece.rows * piece.columns * piece.item_size].numpy()
        file.read_into(begin, data)
        if running is not None:
            running.feed(begin, data)

    def _weights(self, job: Job) -> list[dict[str, Tensor]]:
        """What the adapters have for a weight. Large ones are read when nothing needs those of the weights before any more."""
        size = sum(addition.layer.nbytes for addition in job.additions)
        if self._loaded_bytes + size > _LOADED_BYTES:
            self._land(0)
            self._loaded_bytes = 0
        self._loaded_bytes += size
        return [addition.layer.stored() for addition in job.additions]


def _merged(piece: Piece, buffer: Tensor, read: Future[None], weights: list[dict[str, Tensor]]) -> Any:
    """The bytes of a piece of the result, in one of the two parts of ``buffer``; the source's are in the first."""
    read.result()
    job, count = piece.job, piece.rows * piece.columns
    if job.is_copy:
        return buffer[0, : count * piece.item_size].numpy()
    here, other = buffer[0], buffer[1]
    typed = _typed(here, job.source.info.dtype, count)
    if job.computed != job.source.info.dtype:
        typed, here, other = _typed(other, job.computed, count).copy_(typed), other, here
    strip = typed.view(piece.rows, piece.columns)
    for addition, its in zip(job.additions, weights, strict=True):
        merge_strip_(strip, piece.row, piece.column, its, addition.scaling, addition.fan_in_fan_out)
    if job.dtype != job.computed:
        typed = _typed(other, job.dtype, count).copy_(typed)
    return typed.view(torch.uint8).numpy()


def _typed(buffer: Tensor, dtype: str, count: int) -> Tensor:
    kind = TORCH_DTYPES[dtype]
    return buffer[: count * kind.itemsize].view(kind)


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
