# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on and with: machine, versions, commit, and the floor, which no kernel can beat."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_ext import build_info
from gralora_ext.cli.report import versions as package_versions

from .shapes import Work
from .timing import Contender, interleave

ROOT = Path(__file__).resolve().parent.parent
CACHED_BYTES = 8 << 20
LARGE_BYTES = 256 << 20
GEMM_SIZE = 1536
PACE_GEMM_SIZE = 384  # short enough to take turns with what is measured


def machine(device: torch.device) -> dict[str, Any]:
    """CPU model, cores that this process may use, caches that one core sees and memory (bytes), OS, GPU."""
    return {
        "cpu": _first(r"model name\s*:\s*(.+)", "/proc/cpuinfo") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "memory": int(_first(r"MemTotal:\s+(\d+) kB", "/proc/meminfo") or 0) * 1024,
        "os": platform.platform(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
    }


def slug(machine: dict[str, Any]) -> str:
    """A short name for folders: the CPU, the cores, the GPU."""
    words = re.sub(r"\(.*?\)|@.*|\bCPU\b|\bProcessor\b", " ", machine["cpu"])
    name = f"{words} {machine['cores']}c {machine['gpu'] or ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def available_memory() -> int:
    """Bytes that the system can give without swapping; without an answer, as many as there can be."""
    return int(_first(r"MemAvailable:\s+(\d+) kB", "/proc/meminfo") or 2**50) * 1024


def versions() -> dict[str, Any]:
    """Of Python, torch, PEFT and the like, of gralora_ext, and of the compiler that built it."""
    info = build_info()
    return {**package_versions(), **{key: info[key] for key in ("compiler", "build", "cpu_capability")}}


def commit() -> dict[str, Any]:
    """The checkout's commit, and whether files differ from it; None outside of a checkout."""
    revision, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {"commit": revision, "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _caches() -> dict[str, int]:
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size.rstrip("K")) * 1024
    return found


def _first(pattern: str, path: str) -> str | None:
    try:
        match = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return match[1].strip() if match else None


@dataclass(frozen=True)
class Bandwidth:
    """Bytes/s, read + written: of a copy into memory that was written before, and of an update in place.

    A copy brings the lines of its destination into the cache only to overwrite them; an update does
    not.
    """

    copy: float
    update: float

    @property
    def best(self) -> float:
        return max(self.copy, self.update)


@dataclass(frozen=True)
class Floor:
    """The fp32 GEMM peak in FLOP/s, and the bandwidths of memory in cache and far out of it.

    ``pace_seconds``: the least time of the short GEMM of :func:`pace_contender`.
    """

    gemm: float
    cached: Bandwidth
    large: Bandwidth
    pace_seconds: float

    def bandwidth(self, working_set: int) -> float:
        """The best of the two measured sizes, and on a straight line between them over the logarithm of the size."""
        place = math.log(working_set / CACHED_BYTES) / math.log(LARGE_BYTES / CACHED_BYTES)
        share = min(1.0, max(0.0, place))
        return (1 - share) * self.cached.best + share * self.large.best

    def least_seconds(self, work: Work) -> float:
        """max(FLOPs/peak, bytes/bandwidth)."""
        return max(work.flops / self.gemm, work.bytes / self.bandwidth(work.working_set))

    def pace(self, samples: list[float]) -> float:
        """How fast the machine was while ``samples`` of :func:`pace_contender` were taken; 1 is as fast as in the floor."""
        return self.pace_seconds / statistics.median(samples)

    def as_dict(self) -> dict[str, Any]:
        sizes = {"gemm_size": GEMM_SIZE, "pace_gemm_size": PACE_GEMM_SIZE}
        return {**asdict(self), "cached_bytes": CACHED_BYTES, "large_bytes": LARGE_BYTES, **sizes}


def pace_contender(device: torch.device) -> Contender:
    """A short fp32 GEMM: beside a bench's contenders it tells how much of its arithmetic other users leave the machine."""
    return _gemm(PACE_GEMM_SIZE, device)


def measure_floor(device: torch.device, seconds: float) -> Floor:
    """The best of the samples taken in ``seconds``: a floor is what the machine can do, not what it does on average.

    Copy and update both touch a working set of ``CACHED_BYTES`` or ``LARGE_BYTES`` in all.
    """
    contenders = {("gemm", 0): _gemm(GEMM_SIZE, device)}
    for size in (CACHED_BYTES, LARGE_BYTES):
        memory = torch.ones(2, size // 8, dtype=torch.float32, device=device)
        contenders["copy", size] = _copy(memory)
        contenders["update", size] = _update(memory)
    best = {name: min(values) for name, values in interleave(contenders, 0.8 * seconds, 3, device).items()}

    def bandwidth(size: int) -> Bandwidth:
        """A copy reads one half of the memory and writes the other, an update reads and writes all of it."""
        return Bandwidth(copy=size / best["copy", size], update=2 * size / best["update", size])

    gemm = 2 * GEMM_SIZE**3 / best["gemm", 0]
    # Beside the copies its operands would come from memory each time.
    alone = interleave({"pace": pace_contender(device)}, 0.2 * seconds, 3, device)
    return Floor(gemm, bandwidth(CACHED_BYTES), bandwidth(LARGE_BYTES), min(alone["pace"]))


def _gemm(size: int, device: torch.device) -> Contender:
    a, b, c = (torch.ones(size, size, device=device) for _ in range(3))
    return Contender(lambda: torch.mm(a, b, out=c))


def _copy(memory: Tensor) -> Contender:
    return Contender(lambda: memory[0].copy_(memory[1]))


def _update(memory: Tensor) -> Contender:
    return Contender(lambda: memory.mul_(1.0))
