# SPDX-License-Identifier: Apache-2.0
"""What an analysis says, from the files of its runs: the tables behind its figure, and the findings. Needs no torch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._gralora_k import nearest_k
from ..program.errors import JobError
from . import findings
from .findings import Finding
from .grid_findings import Case, best_k, worse_at_high_rank
from .methods import k_of
from .summary import Spread, spread

CHANGED = 0.01  # a block whose gradient an outlier changes by more than this share is one that it reaches

Record = dict[str, Any]
Records = Mapping[tuple[int, str], Sequence[Record]]  # by rank and method, in the order of seeds


def of_ranks(
    records: Records, wide: Mapping[int, Sequence[dict[str, int]]], wide_rank: int, width: int
) -> dict[str, Any]:
    """``wide``: for each k the ranks of the wide layer, by seed."""
    r = next(rank for rank, _ in records)
    in_model = {k: [layer for record in of_k for layer in record["extra"]] for k, of_k in _by_k(records).items()}
    found = [
        findings.rank_in_model(in_model, r, _seeds(records), _parameters(records)),
        findings.rank_of_paper(wide, wide_rank, width, width**2),
    ]
    tables = {"in_model": {str(k): v for k, v in in_model.items()}, "wide": {str(k): [*v] for k, v in wide.items()}}
    return {"rank": r, "wide_rank": wide_rank, "width": width, **tables, "findings": _dicts(found)}


def of_outliers(records: Records) -> dict[str, Any]:
    """``means`` are over layers; those of ``block_cosines`` are over the blocks that have the outlier among their inputs."""
    by_k = _by_k(records)

    def over_seeds(value: Callable[[dict[str, Any]], float]) -> dict[int, Spread]:
        """Of each k the mean over the layers of ``value``."""
        means = {k: [sum(map(value, one["extra"])) / len(one["extra"]) for one in of_k] for k, of_k in by_k.items()}
        return {k: Spread(tuple(values)) for k, values in means.items()}

    def in_column(name: str) -> Callable[[dict[str, Any]], float]:
        return lambda layer: sum(row[layer["block_column"]] for row in layer[name]) / len(layer[name])

    shares = over_seeds(lambda layer: _share(layer["change"]))
    names = ("cosine_with", "cosine_without", "cosine_of_a", "cosine_of_b", "size_of_a")
    means = {name: over_seeds(operator.itemgetter(name)) for name in names}
    means |= {name: over_seeds(in_column(name)) for name in ("block_cosines_with", "block_cosines_without")}
    found = [
        findings.blocks_reached(shares, _seeds(records), _parameters(records)),
        findings.nearer_to_full(means["cosine_with"], means["cosine_without"], _parameters(records)),
    ]
    layers = [
        {"k": k, "seed": record["run"]["seed"], **layer}
        for k, of_k in by_k.items()
        for record in of_k
        for layer in record["extra"]
    ]
    return {
        "rank": next(rank for rank, _ in records),
        "shares": _spreads(shares),
        "means": {name: _spreads(of) for name, of in means.items()},
        "layers": layers,
        "findings": _dicts(found),
    }


def of_grid(records: Records, at_edge: Mapping[tuple[int, str], bool]) -> dict[str, Any]:
    """``at_edge``: whether a case's learning rate is the least or the greatest that was tried. Raises JobError."""
    cases: dict[tuple[int, int], Case] = {}
    for (rank, name), of_case in records.items():
        losses = spread([record["results"]["loss"] for record in of_case])
        cases[rank, k_of(name)] = Case(losses, at_edge[rank, name])
    ranks = sorted({rank for rank, _ in cases})
    # Of GraLoRA the k of the paper's ratio: the best one would be chosen on the test rows.
    ks = sorted({k for _, k in cases if k > 1})
    nearest = {rank: nearest_k(rank, ks) for rank in ranks}
    lora = {rank: cases[rank, 1] for rank in ranks}
    gralora = {rank: cases[rank, nearest[rank]] for rank in ranks}
    for name, by_rank in (("LoRA", lora), ("GraLoRA", gralora)):
        if not any(case.losses for case in by_rank.values()):
            raise JobError(f"analyze grid: each case of {name} has a run that diverged: try a smaller --lrs")
    parameters = _parameters(records)
    found = [
        worse_at_high_rank("LoRA", lora, True, parameters),
        worse_at_high_rank("GraLoRA with r/k² nearest to 8", gralora, False, parameters, nearest),
        best_k(cases, parameters),
    ]
    cells = [
        {
            "r": r,
            "k": k,
            **(case.losses.as_dict() if case.losses else {"mean": None, "deviation": None, "values": []}),
            "predicted": k == nearest_k(r, [1, *ks]),
        }
        for (r, k), case in cases.items()
    ]
    return {"cells": cells, "findings": _dicts(found)}


def _by_k(records: Records) -> dict[int, Sequence[Record]]:
    return {k_of(name): of_case for (_, name), of_case in records.items()}


def _seeds(records: Records) -> int:
    return len(next(iter(records.values())))


def _parameters(records: Records) -> int:
    """Of the model."""
    return next(iter(records.values()))[0]["results"]["model_parameters"]


def _share(change: list[list[float]]) -> float:
    values = [value for row in change for value in row]
    return sum(value > CHANGED for value in values) / len(values)


def _spreads(by_k: Mapping[int, Spread]) -> dict[str, Any]:
    return {str(k): s.as_dict() for k, s in by_k.items()}


def _dicts(found: Sequence[Finding]) -> list[dict[str, str]]:
    return [one.as_dict() for one in found]
