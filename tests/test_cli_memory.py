# SPDX-License-Identifier: Apache-2.0
"""The finetuning job and the benchmark of a training step keep freed memory for the next allocation."""

from __future__ import annotations

import ctypes
import sys

import pytest
from helpers import run_python

FAULTS = """
import resource, torch
from gralora_ext.program.memory import keep_freed_memory

def faults():
    for call in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20 << 20)
        found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return found

torch.set_num_threads(1)
without = faults()
assert keep_freed_memory()
print(without, faults())
"""


@pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")),
    reason="mallopt is glibc's",
)
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    pages = (20 << 20) * 4 // 4096
    without, kept = map(int, run_python(FAULTS).split())
    assert without >= pages // 600  # huge pages may be on
    assert kept < 10
