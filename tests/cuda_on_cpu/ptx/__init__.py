# SPDX-License-Identifier: Apache-2.0
"""Runs PTX on numpy: what nvcc made of a kernel, inline assembly included, without a GPU."""

# The opcodes register themselves.
from . import (  # noqa: F401
    opcodes_arithmetic,
    opcodes_bits,
    opcodes_convert,
    opcodes_matrix,
    opcodes_memory,
    opcodes_threads,
)
from .errors import PtxError
from .interpreter import Gpu

__all__ = ["Gpu", "PtxError"]
