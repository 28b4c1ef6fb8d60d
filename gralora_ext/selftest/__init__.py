# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext info --selftest``: whether the kernels compute on the processors of this machine what they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import _loader, kernels
from .passes import cases, check

LEAST_CAPABILITY = (8, 0)  # of the instructions that are tried; the plain kernels use none of them


class Result(NamedTuple):
    """What was found on one processor: how many instructions and results were right, and what was not."""

    processor: str
    instructions: int
    results: int
    worst: float  # error of the results, as a share of what is allowed
    wrong: list[str]

    @property
    def sentence(self) -> str:
        """Whether the processor is to be trusted."""
        tried = f"{self.instructions} instructions and " if self.instructions else ""
        if not self.wrong:
            return (
                f"{self.processor} is trustworthy: {tried}{self.results} results agree with the reference, "
                f"at worst with {self.worst:.0%} of the allowed error."
            )
        return f"{self.processor} is NOT trustworthy: {len(self.wrong)} of {tried}{self.results} results are wrong."


def devices() -> list[torch.device]:
    """The CPU, and the CUDA devices that the extension has kernels for."""
    found = [torch.device("cpu")]
    if _loader.load().build()["cuda_archs"] and torch.cuda.is_available():
        found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [device for device in found if kernels.has_kernels(device)]


def run(device: torch.device, say: Callable[[str], None] = lambda line: None) -> Result:
    """Tries all on ``device``; ``say`` gets a line before each step."""
    name, instructions, wrong = "the CPU", 0, list[str]()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} (cuda:{device.index})"
        if torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY:
            say("instructions")
            instructions, wrong = _instructions(device)
    results, worst = 0, 0.0
    for case in cases():
        say(str(case))
        for what, share in check(case, device):
            results, worst = results + 1, max(worst, share)
            if not share <= 1:
                wrong.append(f"{what}: {share:.3g} times the allowed error")
    return Result(name, instructions, results, worst, wrong)


def _instructions(device: torch.device) -> tuple[int, list[str]]:
    import numpy as np

    from .instructions import CASES, wrong_ones

    def launch(name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
        with torch.cuda.device(device):
            there = [torch.from_numpy(array.view(np.uint8).reshape(-1).copy()).to(device) for array in arrays]
            torch.cuda.synchronize()
            _loader.load().run_cuda_instruction(name, [tensor.data_ptr() for tensor in there])
            torch.cuda.synchronize()
        return [t.cpu().numpy().view(a.dtype).reshape(a.shape) for t, a in zip(there, arrays, strict=True)]

    return len(CASES), [f"instruction {name}: not what the PTX ISA says" for name in wrong_ones(launch)]
