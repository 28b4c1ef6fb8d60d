# SPDX-License-Identifier: Apache-2.0
"""What the paper says, what was measured, and one sentence that follows from the two. Needs no torch.

The paper is arXiv 2505.20355. Its models have billions of parameters; where means are not told
apart over the seeds, this one is too small to show a difference, and that is what the sentence says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .summary import LEAST_SEEDS, Spread, apart

REPRODUCED, NOT_REPRODUCED, OUT_OF_REACH = "reproduced", "not reproduced", "out of reach"
PAPERS_RANKS = {2: 256, 4: 512, 8: 1016}  # of ΔW at r = 128


@dataclass(frozen=True)
class Finding:
    """``verdict`` is one of the three words above; ``sentence`` begins with it."""

    claim: str
    paper: str
    ours: str
    verdict: str
    sentence: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def finding(claim: str, paper: str, ours: str, verdict: str, why: str) -> Finding:
    return Finding(claim, paper, ours, verdict, f"{verdict.capitalize()}: {why}")


def too_few(claim: str, paper: str, ours: str, seeds: int, parameters: int) -> Finding:
    few = f"this run has {seeds} seed{'s' if seeds > 1 else ''}, and a claim rests on at least {LEAST_SEEDS}"
    return finding(claim, paper, ours, OUT_OF_REACH, f"{few} ({model_size(parameters)}).")


def model_size(parameters: int) -> str:
    millions = parameters / 1e6
    return f"{millions:,.0f} million parameters" if millions >= 1 else f"{parameters:,} parameters"


def rank_in_model(by_k: Mapping[int, Sequence[Mapping[str, int]]], r: int, seeds: int, parameters: int) -> Finding:
    """``by_k``: for each k the layers of all seeds, each with ``most`` (what ΔW can have) and ``float64`` (measured)."""
    layers = [layer for of_k in by_k.values() for layer in of_k]
    each = len(layers) // (len(by_k) * seeds)
    equal = sum(layer["float64"] == layer["most"] for layer in layers)
    ranks = ", ".join(f"{_range([layer['float64'] for layer in of_k])} for k = {k}" for k, of_k in by_k.items())
    claim, ours = "After training, the rank of ΔW is k·r.", f"{ranks} at r = {r}"
    if seeds < LEAST_SEEDS:
        return too_few(claim, "k·r", ours, seeds, parameters)
    return finding(
        claim,
        "k·r",
        ours,
        REPRODUCED if equal == len(layers) else NOT_REPRODUCED,
        f"in {equal} of {len(layers)} cases ({each} layers of the model, {len(by_k)} k, {seeds} seeds) the rank of ΔW "
        "in float64 is k·r, or the layer's narrower side where that is less.",
    )


def rank_of_paper(by_k: Mapping[int, Sequence[Mapping[str, int]]], r: int, width: int, parameters: int) -> Finding:
    """The same of one wide layer, at the paper's r."""
    ours = {k: [layer["float64"] for layer in layers] for k, layers in by_k.items()}
    far = [abs(value / PAPERS_RANKS[k] - 1) for k, values in ours.items() if k in PAPERS_RANKS for value in values]
    verdict = REPRODUCED if max(far) <= 0.01 else NOT_REPRODUCED
    paper = ", ".join(f"{rank:,} for k = {k}" for k, rank in PAPERS_RANKS.items())
    claim = f"At r = {r} the rank of ΔW is {paper}."
    found = ", ".join(f"{_range(values)} for k = {k}" for k, values in ours.items())
    if (seeds := min(map(len, ours.values()))) < LEAST_SEEDS:
        return too_few(claim, paper, found, seeds, parameters)
    return finding(
        claim,
        paper,
        found,
        verdict,
        f"in one layer of {width:,} x {width:,}, trained alone toward a random matrix, the ranks in float64 differ "
        f"from the paper's by at most {max(far) * 100:.1f} %.",
    )


def blocks_reached(shares: Mapping[int, Spread], seeds: int, parameters: int) -> Finding:
    """``shares``: for each k the share of ΔW's gradient blocks that an outlier channel changes; LoRA is k = 1."""
    claim = "An outlier channel changes the gradient of all of LoRA's ΔW, and of k of GraLoRA's k² blocks."
    paper = ", ".join(f"{1 / k:.3g} for k = {k}" for k in shares)
    ours = ", ".join(f"{share.text(3)} for k = {k}" for k, share in shares.items())
    if seeds < LEAST_SEEDS:
        return too_few(claim, paper, ours, seeds, parameters)
    equal = all(abs(value - 1 / k) < 1e-9 for k, share in shares.items() for value in share.values)
    what = "is 1/k in each seed" if equal else "is not 1/k in each seed"
    return finding(
        claim, paper, ours, REPRODUCED if equal else NOT_REPRODUCED,
        f"the share of blocks that the strongest input channel changes by more than 1 %, as a mean over layers, {what}.",
    )  # fmt: skip


def nearer_to_full(cosines: Mapping[int, Spread], without: Mapping[int, Spread], parameters: int) -> Finding:
    """For each k of ΔW's gradient with full fine-tuning's: with the outlier channel, and with it scaled down."""
    claim = "With an outlier channel, GraLoRA's gradient of ΔW is nearer to full fine-tuning's than LoRA's."
    ours = ", ".join(f"cosine {c.text(3)} for k = {k}" for k, c in cosines.items())
    ours += "; without the channel " + ", ".join(f"{c.text(3)} for k = {k}" for k, c in without.items())
    lora, others = cosines[1], {k: c for k, c in cosines.items() if k > 1}
    if len(lora.values) < LEAST_SEEDS:
        return too_few(claim, "nearer (a figure, no number)", ours, len(lora.values), parameters)
    nearer = [k for k, c in others.items() if apart(c, lora) and c.mean > lora.mean]
    farther = [k for k, c in others.items() if apart(c, lora) and c.mean < lora.mean]
    # All k must say the same: one of several pairs is told apart by chance too often.
    every = list(others)
    verdict = REPRODUCED if nearer == every else NOT_REPRODUCED if farther == every else OUT_OF_REACH
    sides = {"nearer": nearer, "farther": farther, "not told apart from LoRA's": set(others) - {*nearer, *farther}}
    told = ", ".join(f"{side} for {_ks(ks)}" for side, ks in sides.items() if ks)
    change = max(abs(cosines[k].mean - without[k].mean) for k in cosines)
    why = f"at {model_size(parameters)} it is {told}; without the channel each cosine is the same within {change:.3f}"
    return finding(claim, "nearer (a figure, no number)", ours, verdict, f"{why}.")


def beside(rows: Sequence[Mapping[str, Any]], key: str, what: str, reference: str = "lora") -> str:
    """One sentence: which rows of a comparison's table have a mean below or above ``reference``'s, which none.

    Each row is a pair with ``reference``, and one that is told apart is named, so that the test's 5 % are for all pairs.
    """
    found = {row["label"]: Spread(tuple(row["metrics"][key]["values"])) for row in rows if key in row["metrics"]}
    names = {row["method"]: row["label"] for row in rows}
    one = found.get(names.get(reference, ""))
    others = {label: s for label, s in found.items() if label not in (names.get(reference), names.get("base"))}
    diverged = [row["label"] for row in rows if row["diverged"] and row["label"] not in found]
    if names.get(reference) in diverged:
        return f"{what}: {names[reference]} diverged, so that no method can be told apart from it."
    if one is None or not {*others, *diverged}:
        return ""
    if (seeds := min(len(s.values) for s in (one, *others.values()))) < LEAST_SEEDS:
        few = f"{seeds} seed{'s' if seeds > 1 else ''}"
        return f"{what}: nothing can be said of which method is better, since this run has {few} and a claim takes {LEAST_SEEDS}."
    sides: dict[str, list[str]] = {"below": [], "above": [], "not told apart from": []}
    for label, s in others.items():
        side = "not told apart from" if not apart(s, one, len(others)) else "below" if s.mean < one.mean else "above"
        sides[side].append(label)
    told = [f"{side} {names[reference]}'s: {', '.join(labels) or 'none'}" for side, labels in sides.items()]
    told += [f"diverged: {', '.join(diverged)}"] if diverged else []
    return f"{what}: {'; '.join(told)}."


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _ks(ks: Any) -> str:
    return ", ".join(f"k = {k}" for k in sorted(ks))


def page(findings: Sequence[Finding]) -> str:
    """For a terminal."""
    lines = []
    for found in findings:
        lines += [found.claim, f"  paper: {found.paper}", f"  ours:  {found.ours}", f"  {found.sentence}", ""]
    return "\n".join(lines)
