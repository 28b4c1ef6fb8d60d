# SPDX-License-Identifier: Apache-2.0
"""Adding an adapter to a whole model, or, where that is broken off, to no layer of it.

PEFT's code stops at the first layer that an adapter does not fit, with the layers before it adapted. It would then take the model
for one that is adapted already, and leave the base weights trained at the next attempt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .uninterrupted import Uninterrupted


@contextmanager
def all_or_nothing(tuner: nn.Module) -> Iterator[None]:
    """Where the block raises, ``tuner`` has the modules of before, which hold what they held and train what they trained."""
    before = [_Before(module) for module in tuner.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    try:
        yield
    except BaseException:
        with Uninterrupted():
            for module in before:
                module.put_back()
            for parameter, trains in trained:
                if parameter.requires_grad != trains:
                    parameter.requires_grad_(trains)
        raise


class _Before:
    """What a module's attributes were, and what those among them held that are plain containers."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.attributes = module, dict(vars(module))
        self.contents = {name: value.copy() for name, value in vars(module).items() if type(value) in (dict, list, set)}

    def put_back(self) -> None:
        own = vars(self.module)
        own.clear()
        own.update(self.attributes)
        for name, content in self.contents.items():
            container: Any = own[name]
            container.clear()
            (container.extend if type(container) is list else container.update)(content)
