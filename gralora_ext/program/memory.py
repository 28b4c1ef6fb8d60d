# SPDX-License-Identifier: Apache-2.0
"""How this process's malloc treats freed memory. For programs of our own only: it is the process's choice, not a library's."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Lets glibc's malloc keep up to 1 GiB of freed memory, in blocks of up to 1 GiB, for the next allocation.

    By default it hands every block above 32 MiB back to the system as soon as it is freed, and new memory costs a page
    fault per 4 KiB: in a training step the logits and their gradients alone are some 600 MB of it.

    Returns:
        Whether this process's C library is glibc and took both settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, KEPT)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, KEPT))
