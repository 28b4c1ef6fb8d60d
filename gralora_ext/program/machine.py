# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on and with: the machine, the versions of what was used, the checkout's commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any


def machine(gpu: str | None = None) -> dict[str, Any]:
    """CPU model, cores that this process may use, caches that one core sees and memory (bytes), OS, and ``gpu``."""
    return {
        "cpu": _first(r"model name\s*:\s*(.+)", "/proc/cpuinfo") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "memory": int(_first(r"MemTotal:\s+(\d+) kB", "/proc/meminfo") or 0) * 1024,
        "os": platform.platform(),
        "gpu": gpu,
    }


def slug(machine: dict[str, Any]) -> str:
    """A short name for folders: the CPU, the cores, the GPU."""
    words = re.sub(r"\(.*?\)|@.*|\bCPU\b|\bProcessor\b", " ", machine["cpu"])
    name = f"{words} {machine['cores']}c {machine['gpu'] or ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def waited() -> float | None:
    """The share of their time that this process's threads were ready to run and had no core; None if it is not known."""
    running = waiting = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            ran, ready, _ = map(int, file.read_text().split())
        except (OSError, ValueError):
            continue
        running, waiting = running + ran, waiting + ready
    return waiting / (running + waiting) if running else None


def available_memory() -> int:
    """Bytes that the system can give without swapping; without an answer, as many as there can be."""
    return int(_first(r"MemAvailable:\s+(\d+) kB", "/proc/meminfo") or 2**50) * 1024


def versions() -> dict[str, Any]:
    """Of Python, torch, PEFT and the like, of gralora_ext, and of the compiler that built it."""
    from gralora_ext import build_info
    from gralora_ext.cli.report import versions as of_packages

    info = build_info()
    return {**of_packages(), **{key: info[key] for key in ("compiler", "build", "cpu_capability", "cuda_archs")}}


def commit(root: Path) -> dict[str, Any]:
    """The commit of the checkout in ``root``, and whether files differ from it; None where ``root`` is no checkout's."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return {"commit": None, "dirty": None}
    status = _git(root, "status", "--porcelain")
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
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
