# SPDX-License-Identifier: Apache-2.0
"""What is committed of comparisons and analyses: whole, as the documents show it, and the same when it is run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compare_helpers import TINY, command, make_work, records

from gralora_ext.compare import contents, summary
from gralora_ext.compare.findings import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED, beside
from gralora_ext.compare.plan import MEASURE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMPARISONS = sorted(path.parent.name for path in RESULTS.glob("compare*/summary.json"))
# A folder without its table holds the runs of one that is not finished.
ANALYSES = [what for what in ("grid", "outlier", "rank") if (RESULTS / f"analyze-{what}" / f"{what}.json").exists()]


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_committed_table_is_that_of_the_committed_runs(name):
    content = json.loads((RESULTS / name / "summary.json").read_text(encoding="utf-8"))
    found = records(RESULTS / name)
    base = next(r for r in found if r["run"]["method"] == "base")
    for row in content["rows"]:
        runs = [r for r in found if (r["run"]["method"], r["run"]["part"]) == (row["method"], MEASURE)]
        assert len(runs) == row["seeds"]
        losses = summary.spread([r["results"]["loss"] for r in runs])
        assert row["metrics"]["loss"]["mean"] == pytest.approx(losses.mean, rel=1e-12)
        assert row["metrics"]["loss"]["text"] == losses.text(4)
        if row["method"] != "base":
            forgotten = summary.spread([r["results"]["general_loss"] - base["results"]["general_loss"] for r in runs])
            assert row["metrics"]["forgetting"]["mean"] == pytest.approx(forgotten.mean, abs=1e-12)


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_committed_sentences_follow_from_the_committed_runs_by_todays_rules(name):
    content = json.loads((RESULTS / name / "summary.json").read_text(encoding="utf-8"))
    found = records(RESULTS / name)
    base = next(r for r in found if r["run"]["method"] == "base")
    of_methods = {row["method"]: [r for r in found if (r["run"]["method"], r["run"]["part"]) == (row["method"], MEASURE)]
                  for row in content["rows"][1:]}  # fmt: skip
    rows = summary.rows(of_methods, base, {})
    for ours, committed in zip(rows, content["rows"], strict=True):
        assert ours["label"] == committed["label"] and ours["metrics"] == committed["metrics"]
    for key, what in (("loss", "Held-out loss"), ("forgetting", "Forgetting")):
        assert beside(rows, key, what) in content["sentences"]


@pytest.mark.parametrize("what", ANALYSES)
def test_the_committed_findings_follow_from_the_committed_runs_by_todays_rules(what):
    content = json.loads((RESULTS / f"analyze-{what}" / f"{what}.json").read_text(encoding="utf-8"))
    named = {r["name"]: r for r in records(RESULTS / f"analyze-{what}")}
    runs: dict = {}
    for name in content["runs"]:  # in the order of seeds
        runs.setdefault((named[name]["run"]["rank"], named[name]["run"]["method"]), []).append(named[name])
    seeds = range(content["settings"]["seeds"])
    assert all([run["run"]["seed"] for run in of_case] == [*seeds] for of_case in runs.values())
    if what == "rank":
        wide = {k: [named[f"wide-k{k}-seed{seed}"]["ranks"] for seed in seeds] for k in (1, 2, 4, 8)}
        made = contents.of_ranks(runs, wide, content["wide_rank"], content["width"])
    elif what == "outlier":
        made = contents.of_outliers(runs)
    else:
        made = contents.of_grid(runs, {(c["rank"], c["method"]): c["at_edge"] for c in content["choices"]})
    assert json.loads(json.dumps(made)) == {key: content[key] for key in made}


@pytest.mark.parametrize("what", ANALYSES)
def test_each_committed_finding_has_the_papers_number_ours_and_a_verdict(what):
    content = json.loads((RESULTS / f"analyze-{what}" / f"{what}.json").read_text(encoding="utf-8"))
    for found in content["findings"]:
        assert found["verdict"] in (REPRODUCED, NOT_REPRODUCED, OUT_OF_REACH)
        assert found["paper"] and found["ours"] and found["sentence"].lower().startswith(found["verdict"])
        if content["settings"]["seeds"] < summary.LEAST_SEEDS:
            assert found["verdict"] == OUT_OF_REACH
    assert set(content["runs"]) <= {r["name"] for r in records(RESULTS / f"analyze-{what}")}


@pytest.mark.parametrize("name", [n for n in ("compare", *ANALYSES) if n != "compare" or n in COMPARISONS])
def test_the_documents_show_the_committed_pictures(name):
    """By a link: a picture lies once, beside its numbers."""
    folder = RESULTS / (name if name == "compare" else f"analyze-{name}")
    assert (ROOT / "docs" / "pictures" / f"{name}.svg").resolve(strict=True) == folder / f"{name}.svg"


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """The committed comparison of a tiny model, made again with the command that made it."""
    work = make_work(tmp_path_factory.mktemp("again"))
    command(work, "compare", "--output", "again", *TINY)
    return records(work / "again")


def test_committed_runs_repeat_bit_for_bit_on_the_same_kind_of_processor(repeated):
    """On another kind, or with another torch, each loss is within the spread of the committed seeds."""
    before, after = ({(r["run"]["method"], r["run"]["part"], r["run"]["rate"], r["run"]["seed"]): r for r in of}
                     for of in (records(RESULTS / "compare-tiny"), repeated))  # fmt: skip
    measured = [key for key in before if key[1] == MEASURE]
    assert {key[0] for key in measured} == {"base", "lora", "gralora-k2"} and len(measured) == 7
    for key in measured:
        one, other = before[key], after[key]
        assert other["results"]["parameters"] == one["results"]["parameters"]
        if _kind(one) == _kind(other):
            assert other["losses"] == one["losses"]
            assert [other["results"][n] for n in ("loss", "general_loss")] == [
                one["results"][n] for n in ("loss", "general_loss")
            ]
        else:
            of_seeds = [r["results"]["loss"] for k, r in before.items() if k[:2] == key[:2]]
            assert abs(other["results"]["loss"] - one["results"]["loss"]) <= max(max(of_seeds) - min(of_seeds), 1e-3)


def _kind(record):
    """What must be the same for the same bits."""
    versions = [record["versions"][name] for name in ("torch", "transformers", "peft", "cpu_capability")]
    return record["machine"]["cpu"], record["machine"]["caches"], *versions, record["threads"]


def test_the_committed_ranks_are_k_r():
    content = json.loads((RESULTS / "analyze-rank" / "rank.json").read_text(encoding="utf-8"))
    for k in (1, 2, 4, 8):
        layers = content["in_model"][str(k)]
        assert len(layers) == 3 * 21, "three seeds, three blocks of seven layers"
        assert all(layer["float64"] == k * content["rank"] for layer in layers)
        assert [layer["float64"] for layer in content["wide"][str(k)]] == [k * content["wide_rank"]] * 3
