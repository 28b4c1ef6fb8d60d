# SPDX-License-Identifier: Apache-2.0
"""What the losses over rank and k say of the paper's claims. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .._gralora_k import nearest_k
from .findings import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED, Finding, finding, model_size, too_few
from .summary import LEAST_SEEDS, Spread, apart


@dataclass(frozen=True)
class Case:
    """One rank and k. ``losses`` is None where a run diverged; ``at_edge`` as :class:`.summary.Choice` has it."""

    losses: Spread | None
    at_edge: bool = False


def worse_at_high_rank(
    name: str, by_rank: Mapping[int, Case], expected: bool, parameters: int, ks: Mapping[int, int] | None = None
) -> Finding:
    """``expected``: whether the paper says that the loss gets worse at the highest rank. One case must have a mean.

    ``ks``: the k of each rank, where it has one.
    """
    claim = f"{name} gets worse at high rank." if expected else f"{name} does not get worse at high rank."
    paper = "best at a middle rank" if expected else "best at the highest rank"
    losses = {r: case.losses for r, case in by_rank.items() if case.losses}
    best, top = min(losses, key=lambda r: losses[r].mean), max(by_rank)
    names = {r: f"r = {r}{f' (k = {ks[r]})' if ks else ''}" for r in sorted(by_rank)}
    ours = ", ".join(f"{losses[r].text(4) if r in losses else 'diverged'} at {words}" for r, words in names.items())
    if (seeds := min(len(s.values) for s in losses.values())) < LEAST_SEEDS:
        return too_few(claim, paper, ours, seeds, parameters)
    others = [r for r in losses if r != top]
    if top not in losses:
        verdict, why = OUT_OF_REACH, f"at the highest rank, r = {top}, a run diverged, so that there is no mean"
    elif best != top and apart(losses[best], losses[top], len(others)):
        verdict = REPRODUCED if expected else NOT_REPRODUCED
        why = f"its loss at r = {top} is above that at r = {best}, and told apart from it"
        if expected and best == min(by_rank):
            why += "; but its loss is least at the lowest rank, and not at a middle one"
    elif best == top and (above := [r for r in others if apart(losses[r], losses[top], len(others))]):
        verdict = NOT_REPRODUCED if expected else REPRODUCED
        why = f"its loss is least at the highest rank, r = {top}, and told apart from that at {_ranks(above)}"
    else:
        verdict = OUT_OF_REACH
        pair = f"its losses at r = {best} and r = {top} are not told apart"
        why = pair if best != top else f"no other rank's loss is told apart from that at r = {top}"
        why += f" over {seeds} seeds, at {model_size(parameters)}"
    cases = {f"r = {r}": case for r, case in sorted(by_rank.items())}
    return finding(claim, paper, ours, verdict, f"{why}{_reservations(cases)}.")


def best_k(cases: Mapping[tuple[int, int], Case], parameters: int) -> Finding:
    """``cases`` by (r, k), LoRA as k = 1: whether the best k is the one with r/k² nearest to 8.

    A rank speaks for it where that k is told apart from all others and better, and against it where
    another one is told apart from that k and better. One rank proves nothing: it follows where two
    k are found so and no rank speaks against it, and it does not where two ranks do.
    """
    claim, paper = "The best k follows r/k² ≈ 8.", "r/k² ≈ 8"
    speaks: dict[str, list[int]] = {"for": [], "against": [], "neither": []}
    told, followed = [], set()
    for r in sorted({r for r, _ in cases}):
        of_rank = {k: case.losses for (rank, k), case in cases.items() if rank == r}
        losses = {k: s for k, s in of_rank.items() if s}
        if not losses:
            speaks["neither"].append(r)
            continue
        best = min(losses, key=lambda k: losses[k].mean)
        told.append(f"k = {best} at r = {r}")
        side = _side(best, nearest_k(r, of_rank), of_rank)
        speaks[side].append(r)
        if side == "for":
            followed.add(best)
    ours = f"least mean loss with {', '.join(told)}"
    seeds = min((len(case.losses.values) for case in cases.values() if case.losses), default=0)
    if seeds < LEAST_SEEDS:
        return too_few(claim, paper, ours, seeds, parameters)
    against = len(speaks["against"])
    verdict = NOT_REPRODUCED if against > 1 else REPRODUCED if len(followed) > 1 and not against else OUT_OF_REACH
    words = {
        "for": "the k with r/k² nearest to 8 is better than all others at {}",
        "against": "another k is better than the one with r/k² nearest to 8 at {}",
        "neither": f"{seeds} seeds do not tell at {{}}",
    }
    told_of = [text.format(_ranks(speaks[side])) for side, text in words.items() if speaks[side]]
    why = f"at {model_size(parameters)} {', '.join(told_of)}"
    if verdict == OUT_OF_REACH:
        why += "; reproduced takes two such k and no rank against them, and not reproduced two ranks against"
    in_words = {f"r = {r}, k = {k}": case for (r, k), case in sorted(cases.items())}
    return finding(claim, paper, ours, verdict, f"{why}{_reservations(in_words)}.")


def _side(best: int, predicted: int, losses: Mapping[int, Spread | None]) -> str:
    """What a rank says, see :func:`best_k`: nothing where the k that would decide it diverged."""
    rivals = [losses[k] for k in losses if k != predicted] if best == predicted else [losses[predicted]]
    least = losses[best]
    if least and rivals and all(rival and apart(least, rival) for rival in rivals):
        return "for" if best == predicted else "against"
    return "neither"


def _reservations(cases: Mapping[str, Case]) -> str:
    """What weakens the sentence: cases that diverged, and those whose rate may not be the best."""
    diverged = [name for name, case in cases.items() if case.losses is None]
    edge = [name for name, case in cases.items() if case.losses and case.at_edge]
    said = f"; a run diverged at {'; '.join(diverged)}" if diverged else ""
    return said + (f"; the learning rate is the least or greatest of those tried at {'; '.join(edge)}" if edge else "")


def _ranks(ranks: Iterable[int]) -> str:
    return ", ".join(f"r = {r}" for r in ranks)
