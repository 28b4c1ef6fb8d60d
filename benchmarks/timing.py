# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every round takes one sample of each contender, so that a busy machine slows all alike."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# A sample of a shorter call is the mean of as many calls as fill this time: the clock and the loop
# then do not count.
SAMPLE_SECONDS = 5e-4
FLUSH_BYTES = 256 << 20  # beyond the L2 of any GPU

Samples = dict[Any, list[float]]


@dataclass(frozen=True)
class Contender:
    """``call`` is timed; ``prepare``, where there is one, runs before every call and is not."""

    call: Callable[[], Any]
    prepare: Callable[[], Any] | None = None


class Clock(Protocol):
    def time(self, contender: Contender, calls: int) -> float: ...


class CpuClock:
    """Wall-clock seconds of one call, the mean of ``calls``."""

    def time(self, contender: Contender, calls: int) -> float:
        if contender.prepare is not None:
            contender.prepare()
        call = contender.call
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """Seconds between two events around one call, after the L2 cache was overwritten."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, contender: Contender, calls: int) -> float:  # one call whatever ``calls`` says: the cache is flushed
        if contender.prepare is not None:
            contender.prepare()
        self.flush.zero_()
        self.start.record()
        contender.call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def interleave(contenders: dict[Any, Contender], seconds: float, rounds: int, device: torch.device) -> Samples:
    """Seconds per call of each contender, one sample a round; the order is drawn anew each round.

    Unmeasured calls come first. Rounds go on until ``seconds`` are over, and there are at least
    ``rounds``.
    """
    clock: Clock = CudaClock() if device.type == "cuda" else CpuClock()
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    samples: Samples = {name: [] for name in order}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        calls = {name: _warm_up(clock, contender) for name, contender in contenders.items()}
        done = 0
        while done < rounds or time.perf_counter() - start < seconds:
            shuffle(order)
            for name in order:
                samples[name].append(clock.time(contenders[name], calls[name]))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def _warm_up(clock: Clock, contender: Contender) -> int:
    """Calls it unmeasured; returns how many calls make a sample."""
    seconds = clock.time(contender, 1)
    if contender.prepare is not None or seconds > SAMPLE_SECONDS * 100:
        return 1
    return max(1, math.ceil(SAMPLE_SECONDS / clock.time(contender, 1)))


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return q1, median, q3


def ratio(ours: list[float], peer: list[float]) -> float | None:
    """The median over the rounds of ours/peer; rounds in which a difference came out ≤ 0 do not count."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True) if b > 0]
    return statistics.median(ratios) if ratios else None


def differences(samples: Samples, base: str) -> Samples:
    """What each contender takes beyond ``base``, round by round."""
    return {
        name: [a - b for a, b in zip(values, samples[base], strict=True)]
        for name, values in samples.items()
        if name != base
    }
