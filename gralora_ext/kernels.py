# SPDX-License-Identifier: Apache-2.0
"""Where the kernels can go. Elsewhere :mod:`gralora_ext.reference`, the same maths in plain torch, takes their place.

The kernels run on the CPU and on the CUDA devices that the extension was built for, and autograd is the only differentiation
that they have a rule for. On other devices, in transforms of ``torch.func`` and in forward mode the plain operations give the
same results, dropout's mask included, at the speed and with the memory of plain torch.
"""

from __future__ import annotations

import functools
import re
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ._build_config import INSTALL_COMMAND
from ._loader import load

_native = load()


def can_take(x: Tensor) -> bool:
    """Whether the ops have a kernel and a derivative for a call with ``x``, as differentiation stands now.

    What is no tensor goes to them too, which refuse it.
    """
    return not isinstance(x, Tensor) or (not _native.needs_plain_torch() and (x.is_cpu or has_kernels(x.device)))


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Where the plain operations run, so that they compute in the dtypes that they say, as the kernels do."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def has_kernels(device: torch.device) -> bool:
    """Whether this build has kernels for ``device``; where it has none, one warning says why and what to do.

    ``meta`` counts: the ops tell the shapes of their results there.
    """
    return device.type in ("cpu", "meta") or _has_kernels(device.type, device.index)


@torch.compiler.assume_constant_result  # nothing to trace: a device has kernels or not
def _has_kernels(kind: str, index: int | None) -> bool:
    return _reason_that_was_told(kind, index) is None


@functools.cache  # one warning for a device
def _reason_that_was_told(kind: str, index: int | None) -> str | None:
    reason = _why_not(kind, index)
    if reason is not None:
        warnings.warn(
            f"{reason}: GraLoRA layers run there on plain torch operations, with the same results but slower",
            stacklevel=2,
        )
    return reason


def _why_not(kind: str, index: int | None) -> str | None:
    if kind != "cuda":
        return f"gralora_ext has kernels for CPUs and CUDA devices, and none for {kind} devices"
    archs = _native.build()["cuda_archs"]
    if not archs:
        return (
            "this build of gralora_ext has no CUDA kernels (to have them, run "
            f"`GRALORA_EXT_CUDA=1 {INSTALL_COMMAND}` in its source tree, where nvcc is installed)"
        )
    capability = torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None
    if capability is None or any(_covers(arch, capability) for arch in archs):
        return None
    card = "{}.{}".format(*capability)
    return (
        f"gralora_ext was built for CUDA devices of compute capability {', '.join(archs)}, and cuda:{index or 0}, "
        f"{torch.cuda.get_device_name(index)}, is of {card} (to have kernels for it, run "
        f"`TORCH_CUDA_ARCH_LIST={card} {INSTALL_COMMAND}` in its source tree)"
    )


def _covers(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``arch``, such as 8.6, 9.0a or 12.0+PTX, runs on a device of ``capability``.

    Machine code runs on devices of its major version, from its minor version on. PTX is compiled by the driver for every later
    device. With an ``f`` PTX too keeps to its major version, with an ``a`` both keep to their own version alone.
    """
    parts = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
    assert parts is not None  # the build has written it
    major, minor, kind, ptx = parts.groups()
    version = int(major), int(minor)
    if kind == "a":
        return version == capability
    return version <= capability and (version[0] == capability[0] or (ptx is not None and kind == ""))


def torch_has_bf16_loops() -> bool:
    """Whether torch multiplies bfloat16 matrices on this CPU by plain loops, as on x86 without AVX-512: many times slower."""
    quick = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # None: a build without it
    return quick is not None and not quick()
