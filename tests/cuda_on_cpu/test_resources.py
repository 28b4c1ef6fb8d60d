# SPDX-License-Identifier: Apache-2.0
"""What nvcc gives each kernel of registers and shared memory, and the modelled times, are what the committed table says."""

from __future__ import annotations

import re

import compilers
import pytest
from devices import DEVICES
from emulated import Library
from resources import TABLE, assembled, kernels_section, launched, model_section
from traffic import library_of_kernels

toolkit = compilers.find_toolkit()
needs_emulator = pytest.mark.skipif(
    toolkit is None or compilers.compiler() is None, reason="needs CUDA's headers and g++"
)
needs_nvcc = pytest.mark.skipif(toolkit is None or toolkit.nvcc is None, reason="there is no nvcc")
REWRITE = "`python tests/cuda_on_cpu/resources.py` rewrites the table"


@pytest.fixture(scope="module")
def library() -> Library:
    library = library_of_kernels()
    library.configure("fifo")
    return library


@needs_emulator
@needs_nvcc
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_the_kernels_of_a_device_are_those_that_passes_launch(device, library):
    assert set(assembled(device.capability)) == set(launched(library))


@needs_emulator
@needs_nvcc
def test_registers_and_shared_memory_are_the_committed_ones(library):
    text = TABLE.read_text("utf-8")
    version = re.search(r"by nvcc ([\d.]+)\n", text)[1]
    if version != compilers.nvcc_version():
        pytest.skip(f"the table is of nvcc {version}")
    assert kernels_section(library) in text, REWRITE


@needs_emulator
def test_modelled_times_are_the_committed_ones(library):
    assert TABLE.read_text("utf-8").endswith(model_section(library)), REWRITE


def test_a_multiprocessor_holds_what_the_table_is_about():
    """At least one block of each kernel, and two of those that load and multiply by turns."""
    rows = re.findall(r"^\| `(\w+)<.*\| (\d+) \| \d+ \|$", TABLE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 30
    assert all(int(blocks) >= 1 for _, blocks in rows)
    assert all(int(blocks) >= 2 for kernel, blocks in rows if kernel in ("expand", "reduce"))
