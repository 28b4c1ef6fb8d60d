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
if {keep}:
    assert keep_freed_memory()
torch.set_num_threads(1)
for call in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")),
    reason="mallopt is glibc's",
)
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    pages = (20 << 20) * 4 // 4096
    assert int(run_python(FAULTS.format(keep=False))) >= pages // 600  # huge pages may be on
    assert int(run_python(FAULTS.format(keep=True))) < 10
