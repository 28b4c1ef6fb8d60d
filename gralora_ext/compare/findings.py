# SPDX-License-Identifier: Apache-2.0
"""What the paper says, what was measured, and one sentence that follows from the two. Needs no torch.

The paper is arXiv 2505.20355. Its models have billions of parameters; where a difference is within
the spread over seeds, this one is too small to show it, and that is what the sentence says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .summary import LEAST_SEEDS, Spread, apart

REPRODUCED, NOT_REPRODUCED, OUT_OF_REACH = "reproduced", "not reproduced", "out of reach"
PAPERS_RANKS = {2: 256, 4: 512, 8: 1016}  # of ΔW at r = 128
PAPERS_RATIO = 8  # r/k² of the paper's best settings
KS = (1, 2, 4, 8)


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
        f"in {equal} of {len(layers)} trained layers of the model ({seeds} seeds) the rank of ΔW in "
        "float64 is k·r, or the layer's narrower side where that is less.",
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


def nearer_to_full(cosines: Mapping[int, Spread], parameters: int) -> Finding:
    """``cosines``: for each k, of ΔW's gradient with full fine-tuning's, the outlier channel in it."""
    claim = "With an outlier channel, GraLoRA's gradient of ΔW is nearer to full fine-tuning's than LoRA's."
    ours = ", ".join(f"cosine {c.text(3)} for k = {k}" for k, c in cosines.items())
    lora, others = cosines[1], {k: c for k, c in cosines.items() if k > 1}
    if len(lora.values) < LEAST_SEEDS:
        return too_few(claim, "nearer (a figure, no number)", ours, len(lora.values), parameters)
    nearer = [k for k, c in others.items() if apart(c, lora) and c.mean > lora.mean]
    farther = [k for k, c in others.items() if apart(c, lora) and c.mean < lora.mean]
    verdict = (
        OUT_OF_REACH if not nearer and not farther else REPRODUCED if len(nearer) == len(others) else NOT_REPRODUCED
    )
    within = _ks(set(others) - {*nearer, *farther})
    why = f"it is nearer for {_ks(nearer)}, farther for {_ks(farther)}, and within the spread for {within}"
    return finding(claim, "nearer (a figure, no number)", ours, verdict, f"{why}, at {model_size(parameters)}.")


def worse_at_high_rank(name: str, losses: Mapping[int, Spread], expected: bool, parameters: int) -> Finding:
    """``losses`` by rank; ``expected``: whether the paper says that they get worse at the highest."""
    claim = f"{name} gets worse at high rank." if expected else f"{name} does not get worse at high rank."
    paper = "best at a middle rank" if expected else "best at the highest rank"
    best, last = min(losses, key=lambda r: losses[r].mean), max(losses)
    ours = f"{losses[best].text(4)} at r = {best}, {losses[last].text(4)} at r = {last}"
    if (seeds := min(len(s.values) for s in losses.values())) < LEAST_SEEDS:
        return too_few(claim, paper, ours, seeds, parameters)
    if best != last and apart(losses[best], losses[last]):
        verdict = REPRODUCED if expected else NOT_REPRODUCED
        why = f"its loss at r = {last} is above that at r = {best} by more than the spread"
    elif best == last and any(apart(losses[r], losses[last]) for r in losses):
        verdict = NOT_REPRODUCED if expected else REPRODUCED
        why = f"its loss is least at the highest rank, r = {last}"
    else:
        verdict = OUT_OF_REACH
        others = f"r = {best} and r = {last}" if best != last else "all ranks"
        why = f"its losses at {others} are within the spread over seeds, at {model_size(parameters)}"
    return finding(claim, paper, ours, verdict, f"{why}.")


def best_k(losses: Mapping[tuple[int, int], Spread], parameters: int) -> Finding:
    """``losses`` by (r, k), LoRA as k = 1: whether the best k is the one with r/k² nearest to 8."""
    claim = "The best k follows r/k² ≈ 8."
    paper = "r/k² ≈ 8"
    decided: dict[int, bool] = {}
    told = []
    for r in sorted({r for r, _ in losses}):
        of_rank = {k: spread for (rank, k), spread in losses.items() if rank == r}
        best = min(of_rank, key=lambda k: of_rank[k].mean)
        told.append(f"k = {best} at r = {r}")
        predicted = predicted_ks(r, of_rank)
        if any(apart(of_rank[best], of_rank[k]) for k in of_rank if k != best):
            decided[r] = not all(apart(of_rank[best], of_rank[k]) for k in predicted)
    ours = f"least mean loss with {', '.join(told)}"
    if (seeds := min(len(s.values) for s in losses.values())) < LEAST_SEEDS:
        return too_few(claim, paper, ours, seeds, parameters)
    if not decided:
        return finding(
            claim,
            paper,
            ours,
            OUT_OF_REACH,
            f"at no rank do the k differ by more than the spread, at {model_size(parameters)}.",
        )
    right = sum(decided.values())
    verdict = REPRODUCED if right == len(decided) else NOT_REPRODUCED
    why = (
        f"at {right} of the {len(decided)} ranks at which the k differ by more than the spread, the k with r/k² nearest "
        "to 8 is the best or within its spread"
    )
    return finding(claim, paper, ours, verdict, f"{why}.")


def beside(rows: Sequence[Mapping[str, Any]], key: str, what: str, reference: str = "lora") -> str:
    """One sentence: which rows of a comparison's table have a mean below, above, or not told apart from ``reference``'s."""
    found = {row["label"]: Spread(tuple(row["metrics"][key]["values"])) for row in rows if key in row["metrics"]}
    names = {row["method"]: row["label"] for row in rows}
    one = found.get(names.get(reference, ""))
    others = {label: s for label, s in found.items() if label not in (names.get(reference), names.get("base"))}
    if one is None or not others:
        return ""
    if (seeds := min(len(s.values) for s in (one, *others.values()))) < LEAST_SEEDS:
        few = f"{seeds} seed{'s' if seeds > 1 else ''}"
        return f"{what}: nothing can be said of which method is better, since this run has {few} and a claim takes {LEAST_SEEDS}."
    sides: dict[str, list[str]] = {"below": [], "above": [], "within the spread of": []}
    for label, s in others.items():
        side = "within the spread of" if not apart(s, one) else "below" if s.mean < one.mean else "above"
        sides[side].append(label)
    told = "; ".join(f"{side} {names[reference]}'s: {', '.join(labels) or 'none'}" for side, labels in sides.items())
    return f"{what}: {told}."


def predicted_ks(r: int, ks: Sequence[int] | Mapping[int, Any]) -> list[int]:
    """Those of ``ks`` that bring r/k² nearest to 8, in ratio; both at a tie."""
    far = {k: max(r / k**2, PAPERS_RATIO) / min(r / k**2, PAPERS_RATIO) for k in ks}
    return [k for k in ks if far[k] <= min(far.values()) * (1 + 1e-9)]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _ks(ks: Any) -> str:
    return ", ".join(f"k = {k}" for k in sorted(ks)) or "none"


def page(findings: Sequence[Finding]) -> str:
    """For a terminal."""
    lines = []
    for found in findings:
        lines += [found.claim, f"  paper: {found.paper}", f"  ours:  {found.ours}", f"  {found.sentence}", ""]
    return "\n".join(lines)
