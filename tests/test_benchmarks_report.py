# SPDX-License-Identifier: Apache-2.0
"""The documents' tables: made from the committed results, and the check that they still are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import jobs
from benchmarks.__main__ import main
from benchmarks.report import RESULTS, TABLES, Tables
from gralora_ext.program.errors import JobError

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


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def reported(name: str, results: Path) -> str:
    """The table of this name, from ``results``."""
    return TABLES[name](Tables(results))


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
    page = document(tmp_path, "merge")
    main(["report", str(page)])
    for folder, processor in (
        ("zen-5+codes", "AMD EPYC (Zen 5)"),
        ("zen-4", "AMD EPYC (Zen 4)"),
        ("xeon", "Intel Xeon"),
    ):
        run = json.loads((RESULTS / folder / "results.json").read_text())
        assert f"{processor}, commit {run['git']['commit'][:7]}, {run['date'][:10]}" in page.read_text()
        assert page.read_text().count(f"|{processor}|merge without codes|") == 1


def test_of_two_runs_on_a_processor_the_newer_counts(copied):
    """Where it has the bench: the newer one has the merges alone."""
    old, new = (json.loads((copied / name / "results.json").read_text()) for name in ("zen-5", "zen-5+codes"))
    assert {r["bench"] for r in new["records"]} == {"merge"} and any(r["bench"] == "merge" for r in old["records"])
    assert new["git"]["commit"][:7] in reported("merge", copied) and old["git"]["commit"][:7] in reported(
        "path", copied
    )
    assert old["git"]["commit"][:7] not in reported("merge", copied)


def test_merges_without_codes_are_those_of_ours_that_keeps_nothing(copied):
    file = copied / "zen-5+codes" / "results.json"
    change(copied, "merge", "ours-plain", median=0.5)
    change(copied, "merge", "peft", median=2.0)
    change(copied, "merge", "lora", median=1.0)
    edit_json(file, lambda c: [r["ratios"].update(peft=0.5, lora=1.0) for r in c["records"] if r["unit"] == "s"])
    rows = [line for line in reported("merge", copied).splitlines() if line.startswith("|AMD EPYC (Zen 5)")]
    assert [row.split("|")[2] for row in rows] == [
        "merge with codes",
        "unmerge with codes",
        "merge without codes",
        "unmerge without codes",
    ]
    assert all("|6|2.00 (2.00 to 2.00)|1.00 (1.00 to 1.00)|" in row for row in rows[:2])
    assert all("|6|4.00 (4.00 to 4.00)|2.00 (2.00 to 2.00)|||" in row for row in rows[2:])


def test_a_run_from_before_malloc_was_recorded_says_what_it_did_and_that_the_kernels_have_changed(copied):
    back, since = "freed memory going back to the system (which favours ours)", "The kernels have changed since."
    for name in ("path", "one-token", "merge"):
        assert back in reported(name, copied) and since in reported(name, copied)
    for name in ("step", "layers"):  # these alone kept it then
        text = reported(name, copied)
        assert back not in text and "malloc keeps freed memory" in text and since in text
    for file in copied.glob("*/results.json"):
        edit_json(file, lambda c: c["settings"].update(malloc="as told"))
    for name in ("path", "one-token", "merge", "step", "layers"):
        text = reported(name, copied)
        assert back not in text and since not in text and "malloc as told" in text


def test_a_steps_rounds_stand_beside_it(copied):
    edit_json(
        copied / "xeon" / "results.json",
        lambda c: [r["contenders"]["ours"].update(rounds=77) for r in c["records"] if r["bench"] == "step"],
    )
    assert reported("step", copied).count("|77|") == 2


@pytest.mark.parametrize(("bench", "key"), [("step", "tokens"), ("layers", "tokens"), ("mixed", "rows")])
def test_a_table_whose_words_are_not_true_of_all_its_rows_is_refused(bench, key, copied):
    (_, *others) = (
        (file, i)
        for file in sorted(copied.glob("*/results.json"))
        for i, r in enumerate(json.loads(file.read_text())["records"])
        if r["bench"] == bench and r["case"]["what"] == bench
    )
    file, last = others[-1]
    edit_json(file, lambda c: c["records"][last]["case"].update({key: 12345}))
    with pytest.raises(JobError, match=rf"^{bench}: {key}: .*12345.* differ, and the table tells of one"):
        reported(bench, copied)


def test_where_the_default_job_ran_is_told_of_no_other_metrics(copied):
    assert "commit 8e10a46" in reported("job", copied)
    edit_json(copied / "finetune-default" / "metrics.json", lambda job: job.update(eval_loss_after=0.5))
    with pytest.raises(
        JobError, match=r"measured\.json tells where another metrics\.json was made: .* metrics_sha256 \w{64}"
    ):
        reported("job", copied)


@pytest.mark.parametrize(
    ("change_one", "says"),
    [
        (lambda job: job["config"].update(lr=0.5), "lr: 0.001 and 0.5"),
        (lambda job: job["config"].update(batch_size=8), "batch_size: 4 and 8"),
        (lambda job: job["versions"].update(torch="9"), "versions: "),
        (lambda job: job.update(eval_rows=1), "eval_rows: 32 and 1"),
        (lambda job: job.update(trainable_parameters=1), "trainable_parameters: 4884480 and 1"),
        (lambda job: job.update(steps=7), "steps: 30 and 7"),
    ],
)
def test_jobs_of_different_settings_are_not_averaged(change_one, says, copied):
    edit_json(copied / "finetune-4bit" / "lora-2.json", change_one)
    with pytest.raises(JobError, match=f"finetune-4bit: {says}.* differ, and the table tells of one"):
        reported("four-bit", copied)


def test_a_merge_in_files_says_what_its_fixed_order_did_until_the_order_is_drawn(copied):
    file = copied / "file-merge" / "measured.json"
    seconds = {"cp": [4.0, 1.5, 1.0, 1.25, 4.5], "merge": [4.0, 3.0, 4.0, 5.0, 9.0], "PEFT": [20.0, 30.0, 16.0]}
    edit_json(file, lambda c: c.update(seconds=seconds))
    text = reported("file-merge", copied)
    assert "In the 3 turns that follow a run of PEFT `cp` took 1.0 to 1.5 s, in the others 4.0 to 4.5." in text
    assert "|5|1.5 (1.0 to 4.5)|2.68|2.00|" in text and "|3|20.0 (16.0 to 30.0)|0.20|0.20|" in text
    edit_json(file, lambda c: c.update(order=[["merge", "cp", "PEFT"]] * 5))
    assert "`cp` took" not in reported("file-merge", copied)


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


def tiny_in_place_of_the_comparison(results):
    shutil.rmtree(results / "compare", ignore_errors=True)
    return (results / "compare-tiny").rename(results / "compare")


def test_a_comparisons_table_names_every_commit_that_made_its_runs_and_what_diverged(copied):
    folder = tiny_in_place_of_the_comparison(copied)
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
    text = jobs.methods(copied)
    assert f"commit {commit}, " in text and text.endswith("commit 0123456 with changes, 2999-01-01.")
    assert "|GraLoRA (k = 2)|0.01 (at the edge)|3|diverged|" in text


def test_a_comparisons_table_says_where_its_runs_are_of_several_processors(copied):
    folder = tiny_in_place_of_the_comparison(copied)
    assert "speeds and memory are not comparable" not in jobs.methods(copied)
    one = next((folder / "runs").glob("lora-*-measure-*.json"))
    record = json.loads(one.read_text())
    record["versions"]["cpu_capability"] = "another one"  # the processor's name may be the same
    one.write_text(json.dumps(record))
    text = jobs.methods(copied)
    assert "Processor or threads differ between runs: speeds and memory are not comparable." in text
    assert f"{record['machine']['cpu']} (another one), {record['threads']} threads, commit " in text


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
