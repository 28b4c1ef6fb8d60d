# SPDX-License-Identifier: Apache-2.0
"""The development build: ``torch.utils.cpp_extension.load`` from the source tree, again whenever a source changed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

from . import _build_config as config

LOCK = "gralora_ext.lock"


def build_directory() -> Path:
    """One folder per source tree, Python and torch, under torch's own cache (``TORCH_EXTENSIONS_DIR``)."""
    parent = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    key = f"{config.ROOT}\n{sys.version}\n{torch.__file__}\n{torch.__version__}"
    return Path(parent) / f"gralora_ext-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


@contextmanager
def _only_one_process(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. The system frees it when a process dies, which torch's own lock file does not survive."""
    with open(folder / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def compile_and_load() -> ModuleType:
    """Compiles what changed and returns ``_C``, which is also put where the prebuilt one would be imported from."""
    config.check_tools()
    build = config.cuda_build(torch.__version__, torch.version.cuda)
    folder = build_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise RuntimeError(
            f"GRALORA_EXT_JIT=1 compiles in {folder}, which cannot be written ({error.strerror}): set TORCH_EXTENSIONS_DIR to "
            "a folder that can."
        ) from None
    with _only_one_process(folder):
        kernels = config.compile_kernels(folder / "kernels", build)
        library = folder / "_C.so"
        if library.exists() and any(path.stat().st_mtime > library.stat().st_mtime for path in kernels):
            library.unlink()  # torch's ninja file does not know these objects, and would not link again
        try:
            module = cpp_extension.load(
                "_C",
                [str(config.ROOT / source) for source in config.COMMON_SOURCES],
                extra_cflags=config.common_flags(torch.__version__, cuda=build),
                # torch joins them with spaces into a line for the shell.
                extra_ldflags=[shlex.quote(str(flag)) for flag in (*kernels, *(build.link_flags if build else []))],
                extra_include_paths=[str(config.ROOT / config.INCLUDE_DIR)],
                build_directory=str(folder),
            )
        except RuntimeError as error:
            raise RuntimeError(config.compile_failure(str(error))) from None
    sys.modules[f"{__package__}._C"] = module
    return module
