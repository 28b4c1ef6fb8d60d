# SPDX-License-Identifier: Apache-2.0
"""What the machine ran out of, told from the errors that Python, torch, C++ and Rust raise for it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import first_sentence

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = {*_FULL, errno.EIO, errno.EROFS}
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers put the system's number into their texts
# torch's writer and the C++ streams below it do not say why a write failed.
_WRITER = ("inline_container", "PytorchStreamWriter", "basic_ios::clear", "iostream error", "iostream stream error")
_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "std::bad_alloc")
_MAPPING = "failed to map segment from shared object"  # what the loader of shared libraries says


def disk_failure(error: BaseException, folder: Path | None = None) -> str | None:
    """Why a write failed, where it is the disk that failed ``error``; None where ``error`` is of another kind.

    A text that does not tell why is looked into by writing a little more into ``folder``.
    """
    for cause in _chain(error):
        number = cause.errno if isinstance(cause, OSError) else None
        rust = _RUST.search(str(cause))
        if rust and number is None:
            number = int(rust[1])
        if number in _DISK:
            return _told(number)
        for full in _FULL:
            if os.strerror(full) in str(cause):  # as torch.save says it, with a number nowhere
                return _told(full)
        if any(mark in str(cause) for mark in _WRITER):
            return (
                _probe(folder)
                or f"the disk did not take all of a file, as where it is full ({first_sentence(cause, 120)})"
            )
    return None


def memory_failure(error: BaseException) -> str | None:
    """What was asked for, where ``error`` says that there is no memory for it; None where it is of another kind."""
    for cause in _chain(error):
        text = str(cause)
        if (
            isinstance(cause, MemoryError)
            or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
            or (isinstance(cause, ImportError) and _MAPPING in text)
            or any(mark in text for mark in _MEMORY)
        ):
            asked = re.search(r"you tried to allocate (\d+) bytes|Tried to allocate ([\d.]+ \w+)", text)
            if not asked:
                return "out of memory"
            return f"out of memory: {asked[2] or f'{int(asked[1]) / 2**20:,.0f} MiB'} more were asked for at once"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _told(number: int) -> str:
    return f"the disk is full ({os.strerror(number)})" if number == errno.ENOSPC else os.strerror(number)


def _probe(folder: Path | None) -> str | None:
    file = (folder or Path()) / ".probe"
    try:
        with open(file, "xb") as probe:
            for _ in range(16):
                probe.write(bytes(1 << 20))
                probe.flush()
    except OSError as error:
        return _told(error.errno) if error.errno in _DISK else None
    finally:
        file.unlink(missing_ok=True)
    return None
