# SPDX-License-Identifier: Apache-2.0
"""The devices that the committed tables are about, by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    capability: int
    multiprocessors: int
    shared: int  # KiB of a multiprocessor
    shared_of_block: int  # KiB, the most that a block may take
    bandwidth: float  # bytes a second, of the device's memory
    peak: float  # FLOPs a second, dense bf16

    @property
    def title(self) -> str:
        return f"compute capability {self.capability / 10}, {self.multiprocessors} multiprocessors"


DEVICES = {
    "A100": Device(80, 108, 164, 163, 2.0e12, 312e12),
    "H100": Device(90, 132, 228, 227, 3.35e12, 990e12),  # SXM
}
