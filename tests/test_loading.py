# SPDX-License-Identifier: Apache-2.0
"""Loading the extension runs nothing that this processor might lack."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gralora_ext import _build_config as config
from gralora_ext._loader import load


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_no_kernel_file_has_code_that_runs_at_import() -> None:
    """Kernel files are compiled for instruction sets that only the run-time choice may enter. GCC gathers a file's dynamic
    initialisers in one function, which is named after the file."""
    symbols = subprocess.run(["nm", load().__file__], capture_output=True, text=True, check=True).stdout
    prefix = "_GLOBAL__sub_I_"
    files = {line.split(prefix)[1] for line in symbols.splitlines() if prefix in line}
    if not files:
        pytest.skip("the extension has no symbols")
    assert "registration.cpp" in files  # where ops register themselves: the names are those of files
    kernels = {Path(source).name for source in config.KERNEL_SOURCES}
    assert not {name for name in files if any(name.startswith(kernel) for kernel in kernels)}
