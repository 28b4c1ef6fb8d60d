# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: what each is to ``finetune``, and the learning rates that are tried. Needs no torch.

All adapters get the same number of parameters (DoRA a little more), the same alpha and the same
learning rates to choose from; rsLoRA's scale is √r times as large, so that its rates begin lower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..program.errors import JobError, did_you_mean

RATES = (1e-3, 3e-3)  # the best one is at an edge, so that one beyond is tried too
RATES_RSLORA = (1e-4, 3e-4, 1e-3)
RATES_FULL = (3e-5, 1e-4, 3e-4)


@dataclass(frozen=True)
class Method:
    """``kind``: ``base`` trains nothing, ``full`` all weights, ``adapter`` an adapter with finetune's ``options``."""

    name: str
    label: str
    kind: str = "adapter"
    rates: tuple[float, ...] = RATES
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def at_rank(self, rank: int) -> dict[str, Any]:
        """finetune's options for as many parameters as LoRA of ``rank`` has."""
        if self.kind != "adapter":
            return {"backend": "lora", "r": 1, "k": 1, "hybrid_r": 0}  # the job's; the adapter is taken off again
        hybrid = rank // 2 if self.options.get("hybrid") else 0
        options = {name: value for name, value in self.options.items() if name != "hybrid"}
        return {"backend": "fused", "k": 1, **options, "r": rank - hybrid, "hybrid_r": hybrid}

    def check_rank(self, rank: int, where: str) -> None:
        """JobError, which begins with ``where``, for a ``rank`` that the method's k does not divide."""
        if self.kind != "adapter":
            return
        adapter = self.at_rank(rank)
        r, k = adapter["r"], 1 if adapter["k"] == "auto" else adapter["k"]
        if r % k:
            raise JobError(f"{where}: k = {k} does not divide the rank {r} of {self.name}")


BASE = Method("base", "no training", "base", ())
_ALL = (
    Method("full", "full fine-tuning", "full", RATES_FULL),
    Method("lora", "LoRA", options={"backend": "lora"}),
    Method("rslora", "rsLoRA", rates=RATES_RSLORA, options={"backend": "lora", "use_rslora": True}),
    Method("dora", "DoRA", options={"backend": "lora", "use_dora": True}),
    *(Method(f"gralora-k{k}", f"GraLoRA (k = {k})", options={"k": k}) for k in (1, 2, 4, 8)),
    Method("gralora-hybrid", "GraLoRA (k = 2, half the rank plain)", options={"k": 2, "hybrid": True}),
    Method("gralora-auto", "GraLoRA (k by layer)", options={"k": "auto"}),
    Method("gralora-rslora", "GraLoRA (k = 2, rsLoRA's scale)", "adapter", RATES_RSLORA, {"k": 2, "use_rslora": True}),
    Method("gralora-orthogonal", "GraLoRA (k = 2, orthogonal start)", options={"k": 2, "init_weights": "orthogonal"}),
)
METHODS = {method.name: method for method in _ALL}
# Without what GraloraConfig brings besides: `--methods all` has it.
DEFAULT = tuple(name for name in METHODS if name not in ("gralora-auto", "gralora-rslora", "gralora-orthogonal"))
QUICK = ("full", "lora", "gralora-k2")


def of_k(k: int) -> Method:
    """The method of an analysis with this k: LoRA is k = 1."""
    return METHODS["lora" if k == 1 else f"gralora-k{k}"]


def k_of(name: str) -> int:
    """The k of a method of an analysis, 1 for LoRA."""
    return int(METHODS[name].options.get("k", 1))


def chosen(names: list[str]) -> list[Method]:
    """The methods of these names, each once, in the order of the table; JobError for one that is unknown."""
    for name in names:
        if name not in (*METHODS, "all"):
            raise JobError(
                f"--methods: there is no {name}{did_you_mean(name, METHODS)}; there are {', '.join(METHODS)}"
            )
    return [method for method in _ALL if method.name in names or "all" in names]


def beyond(rate: float, up: bool) -> float:
    """The next rate of the row …, 1e-4, 3e-4, 1e-3, 3e-3, …"""
    return float(f"{10 ** ((round(2 * math.log10(rate)) + (1 if up else -1)) / 2):.0e}")
