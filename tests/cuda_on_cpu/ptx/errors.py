# SPDX-License-Identifier: Apache-2.0
"""What the interpreter raises; opcodes that it does not know are a NotImplementedError."""


class PtxError(Exception):
    """The kernel did what it must not do."""
