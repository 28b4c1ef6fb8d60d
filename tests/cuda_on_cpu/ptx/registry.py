# SPDX-License-Identifier: Apache-2.0
"""Which function runs which opcode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .interpreter import Block
    from .parser import Instruction

    Handler = Callable[[Block, Instruction, np.ndarray], None]

OPCODES: dict[str, Handler] = {}


def opcode(*names: str) -> Callable[[Handler], Handler]:
    """Registers ``handler(block, instruction, lanes)`` for these opcodes; lanes is the mask of the active threads."""

    def register(handler: Handler) -> Handler:
        OPCODES.update(dict.fromkeys(names, handler))
        return handler

    return register


def allow(instruction: Instruction, *modifiers: str) -> None:
    """A modifier that the interpreter does not know must not be passed over; the type, which comes last, is known."""
    if set(instruction.modifiers[:-1]) - set(modifiers):
        raise NotImplementedError(instruction.text)
