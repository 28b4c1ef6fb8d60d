# SPDX-License-Identifier: Apache-2.0
"""GraLoRA, fast: fused C++ kernels and layer classes that plug into PEFT's tuner API.

``gralora_ext.enable()`` makes PEFT's GRALORA type build fused layers; ``gralora_ext.accelerate(model)`` converts the
GraLoRA layers of an existing PEFT model in place.

Importing the package registers its operations with torch, so that exported and compiled programs that hold them can be loaded.
It also works where the native extension is missing (``gralora-ext info`` then says why): the names that need it raise then.
PEFT is imported at the first use of a name that needs it.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import checkpoint as checkpoint
    from . import ops as ops
    from . import reference as reference
    from ._build_info import build_info as build_info
    from .tuner import GraloraConfig as GraloraConfig
    from .tuner import GraloraLinear as GraloraLinear
    from .tuner import GraloraModel as GraloraModel
    from .tuner import accelerate as accelerate
    from .tuner import disable as disable
    from .tuner import enable as enable
    from .tuner import restore as restore

_MODULES = ("checkpoint", "ops", "reference")
_TUNER_NAMES = ("GraloraConfig", "GraloraLinear", "GraloraModel", "accelerate", "disable", "enable", "restore")

__all__ = ["__version__", "build_info", *_MODULES, *_TUNER_NAMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "build_info" or name in _TUNER_NAMES:
        module = importlib.import_module("._build_info" if name == "build_info" else ".tuner", __name__)
        value = globals()[name] = getattr(module, name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_console_script() -> bool:
    """Whether this process is ``gralora-ext`` or ``python -m gralora_ext``, and Python is still looking for its main module.

    A typing error there should be answered at once; importing torch takes seconds.
    """
    program = next(iter(getattr(sys, "argv", [])), "")  # an embedded interpreter may have none
    if program == "-m":
        arguments = sys.orig_argv  # where -m is joined with another option, as in -um, torch is imported
        return "-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == [__name__]
    return os.path.basename(program) == "gralora-ext"


def _register_operations() -> None:
    try:
        importlib.import_module("._registrations", __name__)
    except (ImportError, RuntimeError, ValueError):
        pass  # not built, for another torch, or a wrong environment: importing ops says so


if not _is_console_script():
    _register_operations()
