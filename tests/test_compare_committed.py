# SPDX-License-Identifier: Apache-2.0
"""What is committed of comparisons and analyses: whole, as the documents show it, and the same when it is run again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_helpers import run

import gralora_ext
from gralora_ext.cli import compare as cli
from gralora_ext.compare import summary
from gralora_ext.compare.comparison import Comparison
from gralora_ext.compare.findings import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED
from gralora_ext.compare.methods import METHODS
from gralora_ext.compare.plan import MEASURE
from gralora_ext.program.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMPARED = RESULTS / "compare"
ANALYSES = sorted(path.name.removeprefix("analyze-") for path in RESULTS.glob("analyze-*"))
REPEATED = "gralora-k2"


def records(folder):
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "runs").glob("*.json"))]


def test_the_committed_table_is_that_of_the_committed_runs():
    content = json.loads((COMPARED / "summary.json").read_text(encoding="utf-8"))
    found = records(COMPARED)
    base = next(r for r in found if r["run"]["method"] == "base")
    measured = [r for r in found if r["run"]["part"] == MEASURE]
    for row in content["rows"]:
        rows = [r for r in measured if r["run"]["method"] == row["method"]]
        assert len(rows) == row["seeds"]
        spread = summary.spread([r["results"]["loss"] for r in rows])
        assert row["metrics"]["loss"]["mean"] == pytest.approx(spread.mean, rel=1e-12)
        assert row["metrics"]["loss"]["text"] == spread.text(4)
        forgetting = summary.spread([r["results"]["general_loss"] - base["results"]["general_loss"] for r in rows])
        if row["method"] != "base":
            assert row["metrics"]["forgetting"]["mean"] == pytest.approx(forgetting.mean, abs=1e-12)


@pytest.mark.parametrize("what", ANALYSES)
def test_each_committed_finding_has_the_papers_number_ours_and_a_verdict(what):
    content = json.loads((RESULTS / f"analyze-{what}" / f"{what}.json").read_text(encoding="utf-8"))
    for found in content["findings"]:
        assert found["verdict"] in (REPRODUCED, NOT_REPRODUCED, OUT_OF_REACH)
        assert found["paper"] and found["ours"] and found["sentence"].lower().startswith(found["verdict"])
        if content["settings"]["seeds"] < summary.LEAST_SEEDS:
            assert found["verdict"] == OUT_OF_REACH
    assert set(content["runs"]) <= {r["name"] for r in records(RESULTS / f"analyze-{what}")}


@pytest.mark.parametrize("name", ["compare", *ANALYSES])
def test_the_documents_show_the_committed_pictures(name):
    folder = COMPARED if name == "compare" else RESULTS / f"analyze-{name}"
    shown = ROOT / "docs" / "pictures" / f"{name}.svg"
    assert shown.read_bytes() == (folder / f"{name}.svg").read_bytes()


def test_the_committed_ranks_are_k_r():
    content = json.loads((RESULTS / "analyze-rank" / "rank.json").read_text(encoding="utf-8"))
    for k in (1, 2, 4, 8):
        layers = content["in_model"][str(k)]
        assert len(layers) == 3 * 21 and all(x["float64"] == x["most"] == k * content["rank"] for x in layers)
        assert [x["float64"] for x in content["wide"][str(k)]] == [k * content["wide_rank"]] * 3


@pytest.mark.long
def test_a_committed_run_repeats_bit_for_bit_on_the_same_kind_of_processor(tmp_path):
    """On another kind, or with another torch, its loss is within the spread of the committed seeds."""
    content = json.loads((COMPARED / "summary.json").read_text(encoding="utf-8"))
    assert content["settings"]["quick"], "a run that a test can repeat is a short one"
    before = next(
        r
        for r in records(COMPARED)
        if (r["run"]["method"], r["run"]["part"], r["run"]["seed"]) == (REPEATED, MEASURE, 0)
    )
    rate, output = before["run"]["rate"], tmp_path / "again"
    arguments = ["--quick", "--methods", REPEATED, "--lrs", str(rate), "--seeds", "1", "--output", str(output)]
    planned = Comparison(cli.options(arguments)).chooser.run(METHODS[REPEATED], MEASURE, rate, 0)
    assert planned.name == before["name"], "the settings, the rows and the texts are the same"
    environment = {**os.environ, "PYTHONPATH": str(Path(gralora_ext.__file__).parents[1])}
    environment["OMP_NUM_THREADS"] = str(before["threads"])
    run("compare", *arguments, cwd=tmp_path, env=environment)
    after = json.loads((output / "runs" / f"{planned.name}.json").read_text(encoding="utf-8"))
    kind = ("cpu", "caches")
    same = [before["machine"][key] for key in kind] == [machine()[key] for key in kind]
    same = same and all(before["versions"][key] == after["versions"][key] for key in ("torch", "cpu_capability"))
    if same and after["threads"] == before["threads"]:
        assert after["losses"] == before["losses"]
        assert {k: after["results"][k] for k in ("loss", "general_loss")} == {
            k: before["results"][k] for k in ("loss", "general_loss")
        }
    else:
        spread = next(row for row in content["rows"] if row["method"] == REPEATED)["metrics"]["loss"]["deviation"]
        assert abs(after["results"]["loss"] - before["results"]["loss"]) <= spread
    assert after["results"]["parameters"] == before["results"]["parameters"]
