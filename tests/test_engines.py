# SPDX-License-Identifier: Apache-2.0
"""The rows of the engine matrix (``scripts/engines.sh``) that take seconds, as our layer must pass them.

Those rows of an engine that are run share one start of it, in processes of their own; the first test of an engine
waits for all of them.
"""

from __future__ import annotations

import functools
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent / "engines"))

import matrix

ROWS = {
    "ddp": ["plain"],
    "fsdp1": ["hybrid", "hybrid checkpointing"],
    "fsdp2": ["per adapted layer hybrid", "per Linear hybrid", "per decoder layer"],
    "deepspeed": ["ZeRO-3 hybrid", "ZeRO-3 checkpointing", "ZeRO-3 bf16"],
    "export": ["strict, MLP, hybrid", "strict, MLP, one length", "not strict, Llama", "AOTInductor package, MLP"],
    "compile": [
        "graph breaks, hybrid, dropout, autocast",
        "graphs over nine shapes, training, MLP",
        "training, hybrid",
    ],
    "trainers": ["SFTTrainer, hybrid"],
    "checkpointing": ["reentrant", "selective, products saved, hybrid"],
    "func": ["functional_call", "grad, hybrid", "jvp", "vmap", "vmap over grad"],
    "inspection": ["FLOPs", "FLOPs, hybrid", "jit.trace", "deepcopy"],
}
# What compiles C++, or starts the engine once more beside PEFT's layer
EXHAUSTIVE = {"ZeRO-3 bf16", "not strict, Llama", "AOTInductor package, MLP", "training, hybrid"}
# PEFT's layer runs too where a number of its own is the limit: graphs, the error in bfloat16
BESIDE_PEFTS = {"ZeRO-3 bf16", "graphs over nine shapes, training, MLP", "graph breaks, hybrid, dropout, autocast"}
PACKAGES = {"deepspeed": "deepspeed", "trainers": "trl"}


def cases() -> list[Any]:
    def marks(row: str) -> Any:
        return pytest.mark.exhaustive if row in EXHAUSTIVE else pytest.mark.long

    return [pytest.param(engine, row, marks=marks(row)) for engine, rows in ROWS.items() for row in rows]


@functools.cache
def results(engine: str, rows: tuple[str, ...], tuners: tuple[str, ...]) -> matrix.Results:
    return matrix.run(engine, "|".join(f"^{re.escape(row)}$" for row in rows), tuners)


@pytest.mark.parametrize(("engine", "row"), cases())
def test_engine_gives_what_one_process_gives_without_it(engine: str, row: str, request: pytest.FixtureRequest) -> None:
    if engine in PACKAGES and find_spec(PACKAGES[engine]) is None:
        pytest.skip(f"{PACKAGES[engine]} is not installed (pip install 'gralora_ext[engines]')")
    beside_pefts = row in BESIDE_PEFTS
    run = [i.callspec.params for i in request.session.items if getattr(i, "function", None) is request.function]
    rows = tuple(r["row"] for r in run if r["engine"] == engine and (r["row"] in BESIDE_PEFTS) == beside_pefts)
    outcomes = results(engine, rows, ("peft", "ours") if beside_pefts else ("ours",))
    assert matrix.what_is_wrong(row, outcomes[row]) is None


def test_a_row_is_wrong_where_a_number_or_an_error_is_worse_than_pefts() -> None:
    good = {"ok": True, "difference": 1e-6, "count": 2, "note": "2 graphs"}
    error = {"ok": False, "error": "ValueError: no"}
    wrong = matrix.what_is_wrong
    assert wrong("plain", {"peft": good, "ours": good}) is None
    assert wrong("plain", {"peft": error, "ours": error}) is None
    assert (
        wrong("plain", {"ours": error}) == wrong("plain", {"peft": good, "ours": error}) == "an error: ValueError: no"
    )
    assert "2.0e-05" in wrong("plain", {"peft": error, "ours": {**good, "difference": 2e-5}})
    assert "nan" in wrong("plain", {"ours": {**good, "difference": float("nan")}})
    assert "3 graphs" in wrong("plain", {"peft": good, "ours": {**good, "count": 3, "note": "3 graphs"}})
    noisy = {**good, "difference": 0.01}
    assert wrong("bf16", {"peft": noisy, "ours": {**good, "difference": 0.019}}) is None
    assert wrong("bf16", {"peft": noisy, "ours": {**good, "difference": 0.021}}) is not None
