"""GraLoRA, fast: fused C++ kernels and layer classes that plug into PEFT's tuner API.

``gralora_ext.enable()`` makes PEFT's GRALORA type build fused layers; ``gralora_ext.accelerate(model)`` converts the
GraLoRA layers of an existing PEFT model in place. Names are imported at their first use, so that importing the package
is cheap and works where the native extension is missing (``gralora-ext info`` then says why).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
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

_MODULES = ("ops", "reference")
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
