# SPDX-License-Identifier: Apache-2.0
"""What importing the package does, and leaves to later."""

from __future__ import annotations

import pytest
from helpers import run_python


def test_the_import_registers_the_operations_and_not_the_tuner() -> None:
    run_python(
        """
import sys, gralora_ext, torch
torch.ops.gralora_ext.gralora.default, torch.ops.gralora_ext.linear.default
assert "peft" not in sys.modules and "gralora_ext.tuner" not in sys.modules
"""
    )


@pytest.mark.parametrize("program", ["/usr/local/bin/gralora-ext", "gralora-ext"])
def test_the_console_script_reads_its_options_before_torch_is_imported(program: str) -> None:
    run_python(
        f"""
import sys
sys.argv = [{program!r}, "finetune", "--nonsense"]
from gralora_ext.cli import main
assert main() == 2 and "torch" not in sys.modules
"""
    )


def test_a_missing_extension_shows_at_the_first_use() -> None:
    run_python(
        """
import importlib.machinery
importlib.machinery.EXTENSION_SUFFIXES.clear()  # as if it were built for another Python
import gralora_ext
try:
    gralora_ext.ops
except RuntimeError as error:
    assert "is not built for Python" in str(error)
else:
    raise AssertionError("ops were found")
"""
    )


def test_a_linear_layer_that_was_patched_before_the_import_is_called() -> None:
    """As libraries that quantize in training do it."""
    run_python(
        "from torch import nn\n"
        "right = nn.Linear.forward\n"
        "nn.Linear.forward = lambda self, x: 2 * right(self, x)\n"
        "from gralora_ext.tuner import frozen\n"
        "assert not frozen.only_multiplies(nn.Linear(2, 2))"
    )
