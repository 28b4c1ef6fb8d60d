# SPDX-License-Identifier: Apache-2.0
"""Loads the native extension once per process: prebuilt, or compiled from the source tree where GRALORA_EXT_JIT=1."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import os
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from . import _build_config as config

PACKAGE = Path(__file__).resolve().parent
_MARK = re.compile(rb"gralora_ext built for torch ([^\0]+)\0")
_SOURCES_MARK = re.compile(config.SOURCES_MARK.encode() + rb"([0-9a-f]{64})")
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
    folders = [PACKAGE]
    if _in_checkout():  # Python finds the sources before the installed package, which may have the extension
        folders += [Path(entry) / PACKAGE.name for entry in sys.path]
    found = [path for path in map(_find, dict.fromkeys(folders)) if path is not None]
    if not found:
        others = sorted(p.name for p in PACKAGE.glob("_C.*.so"))
        seen = f" (it was built for another Python: {', '.join(others)})" if others else ""
        raise RuntimeError(
            f"the native extension of gralora_ext is not built for Python "
            f"{sys.version_info.major}.{sys.version_info.minor}{seen}: "
            f"run `{config.INSTALL_COMMAND}` in its source tree."
        )
    built_for = {path: _torch_of(path) for path in found}
    loadable = [path for path in found if _minor(built_for[path]) == _minor(torch.__version__)]
    if not loadable:
        raise RuntimeError(_other_torch(found[0], built_for[found[0]]))
    path = next(itertools.filterfalse(is_of_other_sources, loadable), loadable[0])
    if is_of_other_sources(path):
        warnings.warn(
            f"the native extension of gralora_ext, {path}, was built from other sources than those in {config.ROOT}: "
            f"run `{_command(path)}` there.",
            stacklevel=2,
        )
    spec = importlib.util.spec_from_file_location(f"{__package__}._C", path)
    assert spec is not None and spec.loader is not None  # it has a suffix of Python's extensions
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        if "undefined symbol" not in str(error):
            raise
        raise RuntimeError(f"{_other_torch(path, built_for[path])} ({error})") from error
    sys.modules[spec.name] = module
    return module


def is_of_other_sources(extension: Path) -> bool:
    """Whether ``extension`` says that it was built from other sources than those of this checkout; False outside one."""
    mark = _SOURCES_MARK.search(extension.read_bytes()) if _in_checkout() else None
    return mark is not None and mark[1].decode() != config.digest_of_sources()


def _in_checkout() -> bool:
    return (config.ROOT / config.INCLUDE_DIR).is_dir()


def _find(folder: Path) -> Path | None:
    """The extension in ``folder`` that this Python can load."""
    return next((p for p in sorted(folder.glob("_C.*")) if p.name.removeprefix("_C") in _SUFFIXES), None)


def _torch_of(extension: Path) -> str:
    mark = _MARK.search(extension.read_bytes())
    return mark.group(1).decode() if mark else "an unknown version"


def _command(extension: Path) -> str:
    """What builds ``extension`` anew where it lies: in a checkout that is an editable installation."""
    editable = _in_checkout() and extension.parent == PACKAGE
    return config.EDITABLE_COMMAND if editable else config.INSTALL_COMMAND


def _minor(version: str) -> list[str]:
    """Patch releases of torch keep the binary interface; minor ones do not."""
    return version.split("+")[0].split(".")[:2]


def _other_torch(extension: Path, built_for: str) -> str:
    return (
        f"the native extension of gralora_ext was built for torch {built_for}, but torch {torch.__version__} is running: "
        f"run `{_command(extension)}` again in its source tree."
    )


def _jit() -> ModuleType:
    if not _in_checkout():
        raise RuntimeError(
            f"GRALORA_EXT_JIT=1 compiles from the source tree, and there is none beside {PACKAGE}: "
            "run Python in a checkout of gralora_ext, or `unset GRALORA_EXT_JIT`."
        )
    from ._jit import compile_and_load

    return compile_and_load()
