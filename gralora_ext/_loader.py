# SPDX-License-Identifier: Apache-2.0
"""Loads the native extension once per process: prebuilt, or compiled from the source tree where GRALORA_EXT_JIT=1."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

from . import _build_config as config

PACKAGE = Path(__file__).resolve().parent
_MARK = re.compile(rb"gralora_ext built for torch ([^\0]+)\0")
_SUFFIXES = tuple(importlib.machinery.EXTENSION_SUFFIXES)

_loaded: ModuleType | None = None
_kind = "none"


def load() -> ModuleType:
    """Returns ``_C``, with ``torch.ops.gralora_ext`` registered.

    ``GRALORA_EXT_JIT=1`` asks for the build from the source tree even beside a prebuilt one; only one of them is ever
    loaded into a process.

    Raises:
        RuntimeError: one sentence: what is missing, and the command that mends it.
        ValueError: an environment variable of ours holds a word that it must not.
    """
    global _loaded, _kind
    if _loaded is None:
        jit = os.environ.get("GRALORA_EXT_JIT", "0")
        if jit not in ("", "0", "1"):
            raise ValueError(f"GRALORA_EXT_JIT must be 0 or 1, or unset, but it is '{jit}'")
        module, kind = (_jit(), "jit") if jit == "1" else (_prebuilt(), "prebuilt")
        # A wrong word in the environment shows here, not at the first training step.
        module.cpu_capability()
        module.cpu_amx()
        _loaded, _kind = module, kind
    return _loaded


def kind() -> str:
    """How the extension came into this process: "prebuilt", "jit", or "none" before :func:`load`."""
    return _kind


def _prebuilt() -> ModuleType:
    path = _find(PACKAGE)
    if path is None and (config.ROOT / config.INCLUDE_DIR).is_dir():
        # In a checkout Python finds the sources before the installed package: take the extension of
        # the latter.
        path = next(filter(None, (_find(Path(entry) / PACKAGE.name) for entry in sys.path)), None)
        if path is not None:
            sys.modules[__package__].__path__.append(str(path.parent))
    if path is None:
        others = sorted(p.name for p in PACKAGE.glob("_C.*.so"))
        seen = f" (it was built for another Python: {', '.join(others)})" if others else ""
        raise RuntimeError(
            f"the native extension of gralora_ext is not built for Python "
            f"{sys.version_info.major}.{sys.version_info.minor}{seen}: "
            f"run `{config.INSTALL_COMMAND}` in its source tree."
        )
    mark = _MARK.search(path.read_bytes())
    built_for = mark.group(1).decode() if mark else "an unknown version"
    if _minor(built_for) != _minor(torch.__version__):
        raise RuntimeError(_other_torch(built_for))
    try:
        return importlib.import_module("._C", __package__)
    except ImportError as error:
        if "undefined symbol" not in str(error):
            raise
        raise RuntimeError(f"{_other_torch(built_for)} ({error})") from error


def _find(folder: Path) -> Path | None:
    """The extension in ``folder`` that this Python can load."""
    return next((p for p in sorted(folder.glob("_C.*")) if p.name.removeprefix("_C") in _SUFFIXES), None)


def _minor(version: str) -> list[str]:
    """Patch releases of torch keep the binary interface; minor ones do not."""
    return version.split("+")[0].split(".")[:2]


def _other_torch(built_for: str) -> str:
    return (
        f"the native extension of gralora_ext was built for torch {built_for}, but torch {torch.__version__} is running: "
        f"run `{config.INSTALL_COMMAND}` again in its source tree."
    )


def _jit() -> ModuleType:
    if not (config.ROOT / config.INCLUDE_DIR).is_dir():
        raise RuntimeError(
            f"GRALORA_EXT_JIT=1 compiles from the source tree, and there is none beside {PACKAGE}: "
            "run Python in a checkout of gralora_ext, or `unset GRALORA_EXT_JIT`."
        )
    from ._jit import compile_and_load

    return compile_and_load()
