# SPDX-License-Identifier: Apache-2.0
"""The rows of the engine matrix (``scripts/engines.sh``) that take seconds, as our layer must pass them.

The rows of an engine share one start of it, in processes of their own; the first test of an engine
waits for all its rows.
"""

from __future__ import annotations

import functools
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent / "engines"))

import matrix

ROWS = {
    "ddp": ["plain"],
    "fsdp1": ["plain", "hybrid", "hybrid checkpointing"],
    "fsdp2": ["per adapted layer hybrid", "per Linear hybrid", "per decoder layer"],
    "deepspeed": ["ZeRO-3 plain", "ZeRO-3 hybrid", "ZeRO-3 checkpointing", "ZeRO-3 bf16"],
    "export": ["strict, MLP, hybrid", "strict, MLP, one length", "not strict, Llama", "AOTInductor package, MLP"],
    "compile": [
        "training, hybrid",
        "graph breaks, hybrid, dropout, autocast",
        "graphs over nine shapes, training, MLP",
    ],
    "trainers": ["SFTTrainer, hybrid"],
    "checkpointing": ["reentrant", "selective, products saved", "selective, products saved, hybrid"],
    "func": ["functional_call", "grad", "grad, hybrid", "jvp", "vmap", "vmap over grad"],
    "inspection": ["FLOPs", "FLOPs, hybrid", "jit.trace", "deepcopy"],
}
# PEFT's layer runs too where a number of its own is the limit: graphs, the error in bfloat16
BESIDE_PEFTS = {"ZeRO-3 bf16", "graphs over nine shapes, training, MLP", "graph breaks, hybrid, dropout, autocast"}
PACKAGES = {"deepspeed": "deepspeed", "trainers": "trl"}


@functools.cache
def results(engine: str, beside_pefts: bool) -> matrix.Results:
    rows = [row for row in ROWS[engine] if (row in BESIDE_PEFTS) == beside_pefts]
    pattern = "|".join(f"^{re.escape(row)}$" for row in rows)
    return matrix.run(engine, pattern, ("peft", "ours") if beside_pefts else ("ours",))


@pytest.mark.parametrize("engine, row", [(engine, row) for engine, rows in ROWS.items() for row in rows])
def test_engine_gives_what_one_process_gives_without_it(engine: str, row: str) -> None:
    if engine in PACKAGES and find_spec(PACKAGES[engine]) is None:
        pytest.skip(f"{PACKAGES[engine]} is not installed (pip install 'gralora_ext[engines]')")
    assert matrix.what_is_wrong(row, results(engine, row in BESIDE_PEFTS)[row]) is None


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
