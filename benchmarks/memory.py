"""Counting memory: what autograd keeps for backward, and how far a call raises the peak of a process."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import Skip
from .timing import Contender


def saved_bytes(call: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd saves during ``call``, each counted once, without those of ``known``.

    A view counts with the whole storage that it keeps alive.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # kept until the end, since a freed storage's address can come again
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


def peak_bytes(contender: Contender, device: torch.device) -> int:
    """How far one call raises the memory held: resident memory of this process, or the allocator's on a GPU.

    It should be the first call of its size in the process: memory that a library keeps for its next call then counts.

    Raises:
        Skip: the system does not let a process reset its peak.
    """
    if contender.prepare is not None:
        contender.prepare()
    return (_cuda_rise if device.type == "cuda" else _resident_rise)(contender)


def _resident_rise(contender: Contender) -> int:
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise Skip(f"it needs Linux and a writable /proc/self/clear_refs ({error})") from None
    before = _status("VmRSS")
    contender.call()
    return max(0, _status("VmHWM") - before)


def _cuda_rise(contender: Contender) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.call()
    return torch.cuda.max_memory_allocated() - before


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
