# SPDX-License-Identifier: Apache-2.0
"""The documents' tables: made from the committed results, and the check that they still are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import compared
from benchmarks.__main__ import main
from benchmarks.report import RESULTS, TABLES

ROOT = RESULTS.parent.parent


def document(folder: Path, *names: str) -> Path:
    """A Markdown file with markers for the tables of these names, and words around them."""
    file = folder / "page.md"
    file.write_text("".join(f"Before.\n\n<!-- figures: {n} -->\n<!-- end of figures -->\n\nAfter.\n" for n in names))
    return file


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the committed results."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.png")))


def change(results: Path, bench: str, contender: str, **values: float) -> None:
    """Changes an entry of every record of ``bench`` in every run of ``results``."""
    for file in results.glob("*/results.json"):
        content = json.loads(file.read_text())
        for record in content["records"]:
            if record["bench"] == bench and contender in record["contenders"]:
                record["contenders"][contender].update(values)
        file.write_text(json.dumps(content))


def drop(results: Path, contender: str) -> None:
    """No run has measured ``contender``."""
    for file in results.glob("*/results.json"):
        content = json.loads(file.read_text())
        for record in content["records"]:
            record["contenders"].pop(contender, None)
            record["ratios"].pop(contender, None)
        file.write_text(json.dumps(content))


def test_every_table_is_written_and_passes_the_check(tmp_path, capsys):
    page = document(tmp_path, *TABLES)
    assert main(["report", str(page), "--check"]) == 1
    assert page.read_text() == document(tmp_path, *TABLES).read_text(), "a check writes nothing"
    assert main(["report", str(page)]) == 0
    text = page.read_text()
    assert main(["report", str(page), "--check"]) == 0
    assert main(["report", str(page)]) == 0 and page.read_text() == text
    assert text.count("|---|") >= len(TABLES) and text.count("Measured with ") >= len(TABLES)
    assert text.count("Before.") == text.count("After.") == len(TABLES)


def test_each_table_names_processor_commit_and_date_of_its_run(tmp_path):
    runs = {file.parent.name: json.loads(file.read_text()) for file in RESULTS.glob("*/results.json")}
    page = document(tmp_path, "merge")
    main(["report", str(page)])
    for run in runs.values():
        if any(record["bench"] == "merge" for record in run["records"]):
            assert f"commit {run['git']['commit'][:7]}, {run['date'][:10]}" in page.read_text()
    for processor in ("AMD EPYC (Zen 5)", "AMD EPYC (Zen 4)", "Intel Xeon"):
        assert f"|{processor}|merge|" in page.read_text()


def test_a_changed_result_changes_the_table_and_fails_the_check(copied, tmp_path, capsys):
    page = document(tmp_path, "step", "merge")
    where = ["--results", str(copied)]
    main(["report", str(page), *where])
    change(copied, "step", "ours", median=12.345, q1=12.0, q3=12.5)
    capsys.readouterr()
    assert main(["report", str(page), *where, "--check"]) == 1
    out = capsys.readouterr().out
    assert f"{page}: table step is not what the results say" in out and "table merge" not in out
    assert "12,345" not in page.read_text()
    assert main(["report", str(page), *where]) == 0 and "|12,345|" in page.read_text()


def test_a_comparisons_table_names_every_commit_that_made_its_runs_and_what_diverged(copied):
    folder = (copied / "compare-tiny").rename(copied / "compare")
    one, *others = sorted((folder / "runs").glob("*.json"))
    commit = json.loads(others[0].read_text())["git"]["commit"][:7]
    later = json.loads(one.read_text()) | {
        "git": {"commit": "0123456789", "dirty": True},
        "date": "2999-01-01T00:00:00",
    }
    one.write_text(json.dumps(later))
    summary = json.loads((folder / "summary.json").read_text())
    summary["rows"][-1]["diverged"] = 1
    del summary["rows"][-1]["metrics"]["loss"]
    (folder / "summary.json").write_text(json.dumps(summary))
    text = compared.methods(copied)
    assert f"commit {commit}, " in text and text.endswith("commit 0123456 with changes, 2999-01-01.")
    assert "|GraLoRA, k = 2|0.01 (at the edge)|3|diverged|" in text


def test_a_figure_typed_by_hand_fails_the_check(tmp_path):
    page = document(tmp_path, "job")
    main(["report", str(page)])
    page.write_text(page.read_text().replace("0.862", "0.762"))
    assert main(["report", str(page), "--check"]) == 1


def test_the_ratio_is_turned_into_times_as_fast(copied, tmp_path):
    """Geometric mean, least and greatest, without the cases of one token, which have a table of their own."""
    for file in copied.glob("*/results.json"):
        content = json.loads(file.read_text())
        wide = iter([0.5, 0.125])
        for record in (r for r in content["records"] if r["bench"] == "forward"):
            record["ratios"] = {"peft": 0.1} if record["case"]["T"] == 1 else {"peft": next(wide, 0.25)}
        file.write_text(json.dumps(content))
    page = document(tmp_path, "path", "one-token")
    main(["report", str(page), "--results", str(copied)])
    rows = [line for line in page.read_text().splitlines() if "|forward|" in line]
    many, one = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert len(many) >= 3 and all("|4.00 (2.00 to 8.00)|" in row for row in many)
    assert all("|10.00 (10.00 to 10.00)|" in row for row in one)


def test_what_was_not_measured_is_not_invented(copied, tmp_path):
    page = document(tmp_path, "path")
    main(["report", str(page), "--results", str(copied)])
    assert "torch.compile|" in page.read_text() and "|not measured|" in page.read_text()
    drop(copied, "peft-compiled")
    main(["report", str(page), "--results", str(copied)])
    assert "torch.compile" not in page.read_text() and "not measured|" not in page.read_text()


def test_loss_and_gradient_norm_stand_in_the_step_where_results_hold_them(copied, tmp_path):
    page = document(tmp_path, "step")
    main(["report", str(page), "--results", str(copied)])
    assert "gradient norm" not in page.read_text()
    change(copied, "step", "ours", loss=10.825, gradient_norm=0.123456)
    main(["report", str(page), "--results", str(copied)])
    assert "(loss; gradient norm)" in page.read_text() and "(10.82; 0.1235)|" in page.read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- figures: speed -->\n<!-- end of figures -->\n", "there are no figures 'speed', only step, "),
        ("<!-- figures: step -->\n", "needs an `<!-- end of figures -->` of its own"),
        ("<!-- end of figures -->\n", "needs an `<!-- end of figures -->` of its own"),
        ("<!-- figures: job -->\n<!-- figures: step -->\n<!-- end of figures -->\n", "of its own"),
        ("<!-- figures: job -->\n<!-- end of figures -->\n" * 2, "the figures 'job' stand there more than once"),
    ],
)
def test_wrong_markers_are_an_error_and_change_nothing(text, says, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(text)
    for arguments in ([], ["--check"]):
        assert main(["report", str(page), *arguments]) == 2
        assert says in capsys.readouterr().err
    assert page.read_text() == text


def test_the_documents_of_the_repository_hold_what_the_results_say(capsys):
    assert main(["report", "--check"]) == 0, capsys.readouterr().out


def test_the_suite_stays_small():
    """At most 22 modules of some 300 lines each, and a page that can be read at once."""
    modules = {file.name: len(file.read_text().splitlines()) for file in RESULTS.parent.rglob("*.py")}
    assert len(modules) <= 22 and max(modules.values()) <= 320, modules
    assert len((RESULTS.parent / "README.md").read_text().split()) <= 900
    assert len((RESULTS / "NOTES.md").read_text().splitlines()) <= 250
