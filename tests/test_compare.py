# SPDX-License-Identifier: Apache-2.0
"""gralora-ext compare: which runs are made, on which rows, what is kept of them, and how a stopped one goes on."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cli_helpers import call, sentence, start
from compare_helpers import SMALL, command, make_here, make_work, records

from gralora_ext.cli import compare as cli
from gralora_ext.compare import findings, runner, texts
from gralora_ext.compare.comparison import Comparison
from gralora_ext.compare.job import RunJob
from gralora_ext.compare.methods import METHODS
from gralora_ext.compare.plan import CHOOSE, MEASURE
from gralora_ext.compare.progress import Progress
from gralora_ext.compare.summary import was_busy
from gralora_ext.compare.texts import gather

METHODS_HERE = ("full", "lora", "gralora-k2")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def compared(work):
    """A comparison of three methods, with two learning rates to choose from and three seeds."""
    said = command(work, "compare", "--output", "out", "--methods", *METHODS_HERE, "--lrs", 3e-3, 1e-2, "--extend", 1)
    return work / "out", said


def measured_runs(output):
    return [r for r in records(output) if r["run"]["part"] == MEASURE and r["run"]["method"] != "base"]


def test_each_method_has_a_run_of_each_seed_and_the_untrained_model_one(compared):
    output, _ = compared
    found = {(r["run"]["method"], r["run"]["seed"]) for r in measured_runs(output)}
    assert found == {(method, seed) for method in METHODS_HERE for seed in range(3)}
    assert sum(r["run"]["method"] == "base" for r in records(output)) == 1


def test_a_run_says_with_what_and_where_it_was_made(compared):
    output, _ = compared
    for record in records(output):
        assert record["versions"]["torch"] and record["machine"]["cpu"] and record["threads"] == 1
        assert set(record["git"]) == {"commit", "dirty"}
        assert record["settings"]["max_length"] == 64
        assert not [value for value in json.dumps(record).split('"') if value.startswith("/")], "a path of this machine"


def test_the_rate_is_the_one_with_the_least_loss_on_the_validation_rows(compared):
    output, _ = compared
    for method in METHODS_HERE:
        tried = {r["run"]["rate"]: r["results"]["loss"] for r in records(output)
                 if (r["run"]["method"], r["run"]["part"]) == (method, CHOOSE)}  # fmt: skip
        taken = {r["run"]["rate"] for r in measured_runs(output) if r["run"]["method"] == method}
        assert taken == {min(tried, key=tried.get)}
        assert len(tried) == (3 if method != "full" else 4), "the best of two is at an edge, so that one more is tried"


def test_no_test_row_is_trained_on_or_chosen_with(work, tmp_path):
    options = cli.options(list(map(str, ["--output", tmp_path / "x", *SMALL])))
    options.model, options.data, options.general_text = (
        str(work / name) for name in ("model", "rows.jsonl", "general.txt")
    )
    comparison = Comparison(options)
    texts = comparison.texts
    texts.write(tmp_path / "texts")
    jobs = {}
    for part in (CHOOSE, MEASURE):
        jobs[part] = RunJob(
            comparison.chooser.run(METHODS["lora"], part, 1e-3, 0), tmp_path / "texts", tmp_path / part, Progress(2)
        )
        jobs[part].check()
    assert jobs[MEASURE].rows.held_out == texts.test and jobs[CHOOSE].rows.held_out == texts.validation
    assert jobs[MEASURE].rows.train == jobs[CHOOSE].rows.train == texts.train
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    pairs = [(row["question"], row["answer"]) for row in rows]
    parts = [texts.train, texts.validation, texts.test]
    assert [len(part) for part in parts] == [50, 4, 6]
    assert sorted(pair for part in parts for pair in part) == sorted(pairs), "each row is in one part"
    assert texts.test != pairs[-6:] and texts.test != pairs[:6], "a file that is sorted would end with rows of one kind"
    assert gather(options).test == texts.test, "the same ones each time"


def test_a_row_that_repeats_counts_once(work, tmp_path):
    """Else a test row's copy would be trained on."""
    rows = (work / "rows.jsonl").read_text()
    (tmp_path / "twice.jsonl").write_text(rows + rows)
    options = cli.options(list(map(str, ["--output", tmp_path / "x", *SMALL])))
    options.data, options.general_text = str(tmp_path / "twice.jsonl"), str(work / "general.txt")
    found = gather(options)
    assert (
        len([*found.train, *found.validation, *found.test]) == len({*found.train, *found.validation, *found.test}) == 60
    )


def test_how_many_test_rows_the_losses_do_not_have_is_said(compared, work):
    options = cli.options(list(map(str, SMALL)))
    options.model, options.data, options.general_text = (
        str(work / name) for name in ("model", "rows.jsonl", "general.txt")
    )
    comparison = Comparison(options)
    comparison.base = next(r for r in records(compared[0]) if r["run"]["method"] == "base")
    assert comparison.base["results"]["held_out_rows"] == 6 and comparison._left_out() == ""
    comparison.base["results"]["held_out_rows"] = 4
    assert (
        "4 of 6 are measured; the answers of the others lie beyond --max-length"
        in comparison.content()["sentences"][-1]
    )


def test_a_general_text_without_a_token_to_predict_is_told(work, monkeypatch):
    monkeypatch.setattr(runner.Runner, "_make", make_here)
    (work / "letter.txt").write_text("x")
    done = call("compare", "--output", "letter", *SMALL, "--general-text", "letter.txt", cwd=work)
    assert done.returncode == 2
    assert "--general-text: expected a text of two tokens or more, got none" in sentence(done)


def test_a_general_loss_that_is_not_finite_is_a_divergence(work, monkeypatch):
    """The held-out loss stays, and the cells of the general text say why they have no number."""
    monkeypatch.setattr(RunJob, "_general_loss", lambda job, trainer: None if job.run.kind == "adapter" else 3.0)
    said = command(work, "compare", "--output", "general", "--methods", "lora", "--lrs", 1e-2, "--seeds", 1)
    row = json.loads((work / "general" / "summary.json").read_text())["rows"][1]
    assert row["diverged"] == 1 and "loss" in row["metrics"] and "general_loss" not in row["metrics"]
    assert "diverged" in said


def test_a_tilde_is_the_home_folder():
    assert cli.options(["--output", "~/compared"]).output == str(Path.home() / "compared")


def test_fewer_reviews_than_asked_for_are_all_of_them(tmp_path, monkeypatch):
    (tmp_path / "reviews.csv").write_text("text,label\n" + "".join(f"review {n}<br />,1\n" for n in range(3)))
    monkeypatch.setattr(texts, "general_text_file", lambda: tmp_path / "reviews.csv")
    options = cli.options(["--general-texts", "5"])
    assert texts._general(options.general_text, options.general_texts)[1] == ["review 0\n", "review 1\n", "review 2\n"]


def test_means_and_spreads_are_those_of_the_runs(compared):
    output, said = compared
    summary = json.loads((output / "summary.json").read_text())
    base = next(r for r in records(output) if r["run"]["method"] == "base")
    for row in summary["rows"][1:]:
        of_method = [r["results"] for r in measured_runs(output) if r["run"]["method"] == row["method"]]
        losses = [r["loss"] for r in of_method]
        assert row["metrics"]["loss"]["mean"] == pytest.approx(statistics.fmean(losses), rel=1e-12)
        assert row["metrics"]["loss"]["deviation"] == pytest.approx(statistics.stdev(losses), rel=1e-9)
        forgotten = statistics.fmean(r["general_loss"] for r in of_method) - base["results"]["general_loss"]
        assert row["metrics"]["forgetting"]["mean"] == pytest.approx(forgotten, abs=1e-12)
        for metric in ("tokens_per_second", "peak_memory", "parameters", "checkpoint"):
            assert row["metrics"][metric]["mean"] > 0 and row["metrics"][metric]["deviation"] is not None
        assert row["metrics"]["loss"]["text"] in said


def test_full_fine_tuning_trains_all_and_adapters_have_the_same_number_of_parameters(compared):
    output, _ = compared
    counts = {r["run"]["method"]: r["results"]["parameters"] for r in measured_runs(output)}
    assert counts["lora"] == counts["gralora-k2"] < counts["full"]
    assert counts["full"] == next(r["results"]["model_parameters"] for r in records(output))
    base = next(r["results"]["loss"] for r in records(output) if r["run"]["method"] == "base")
    assert all(r["results"]["loss"] != base for r in measured_runs(output)), "a method that trains nothing"


def test_all_methods_of_the_table_train(work):
    """Each method with one rate and one seed; DoRA, rsLoRA and GraLoRA's own variants among them."""
    command(work, "compare", "--output", "all", "--methods", "all", "--lrs", 1e-2, "--seeds", 1, "--extend", 0)
    found = {r["run"]["method"]: r for r in measured_runs(work / "all")}
    assert set(found) == set(METHODS)
    losses = {name: r["results"]["loss"] for name, r in found.items()}
    assert losses["rslora"] != losses["lora"] != losses["dora"]
    assert losses["gralora-rslora"] != losses["gralora-k2"] != losses["gralora-hybrid"]
    assert losses["gralora-orthogonal"] != losses["gralora-k2"]
    # At rank 8 `auto` is k = 1 for every layer.
    assert losses["gralora-auto"] == losses["gralora-k1"]


def test_runs_that_are_there_are_not_made_again_and_more_can_be_added(compared, work):
    output = work / "more"
    shutil.copytree(compared[0], output)
    damaged = next(output.glob("runs/lora*seed2*"))
    damaged.write_text(damaged.read_text()[:200])
    before = {path.name: path.stat().st_mtime_ns for path in (output / "runs").glob("*.json")}
    command(work, "compare", "--output", "more", "--methods", "lora", "gralora-k2", "--lrs", 3e-3, 1e-2, "--seeds", 4,
            "--extend", 1)  # fmt: skip
    after = {path.name: path.stat().st_mtime_ns for path in (output / "runs").glob("*.json")}
    again = {name for name in before if after[name] != before[name]}
    assert again == {damaged.name}
    assert {name.split("-")[0] for name in after.keys() - before.keys()} == {"lora", "gralora"}
    assert len(after) == len(before) + 2
    assert json.loads(damaged.read_text())["losses"] == next(
        r["losses"] for r in records(compared[0]) if r["name"] == damaged.name.removesuffix(".json")
    )


@pytest.mark.long
def test_a_killed_comparison_goes_on_with_the_runs_that_are_missing(work):
    """In a process of its own, as users have it."""
    arguments = ("compare", "--output", "killed", "--methods", "lora", "--lrs", 1e-2, "--seeds", 1)
    process = start(*arguments, *SMALL, cwd=work)
    deadline = time.monotonic() + 200
    while not (made := [*(work / "killed" / "runs").glob("base*.json")]) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = made[0].read_bytes()
    command(work, *arguments)
    assert made[0].read_bytes() == first
    assert len(records(work / "killed")) == 2
    assert not [path for path in (work / "killed").rglob("*") if path.name.startswith(".partial-")]


def test_sigterm_ends_the_run_in_hand_too(work):
    process = start("compare", "--output", "stopped", "--methods", "lora", "--lrs", 1e-2, *SMALL, cwd=work)
    deadline = time.monotonic() + 200
    while not any(p.stat().st_size for p in (work / "stopped" / "logs").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 143
    assert not records(work / "stopped") and not [*(work / "stopped").glob(".partial-*")]
    assert error.strip() == "stopped by SIGTERM; finished runs are kept, and the same command goes on with the others"


def test_runs_made_with_another_version_are_not_mixed_in(compared, work):
    output = work / "other-version"
    shutil.copytree(compared[0], output)
    for path in (output / "runs").glob("base*.json"):
        path.write_text(json.dumps({**(record := json.loads(path.read_text())),
                                    "versions": {**record["versions"], "peft": "0.1"}}))  # fmt: skip
    done = call("compare", "--output", "other-version", "--methods", "lora", *SMALL, cwd=work)
    assert done.returncode == 2 and "has runs made with peft 0.1, and here is " in sentence(done)


def test_a_model_that_was_written_anew_has_other_runs(work):
    options = cli.options(list(map(str, SMALL)))
    options.model, options.data, options.general_text = (
        str(work / name) for name in ("model", "rows.jsonl", "general.txt")
    )
    before = Comparison(options).settings.model_files
    assert Comparison(options).settings.model_files == before
    (work / "model" / "config.json").touch()
    after = Comparison(options)
    assert after.settings.model_files != before
    run = after.chooser.run(METHODS["lora"], MEASURE, 1e-3, 0)
    assert run.digest != replace(run, settings=replace(run.settings, model_files=before)).digest


def test_a_run_whose_threads_had_to_wait_for_a_core_is_busy(compared):
    record = records(compared[0])[0]
    assert 0 <= record["waited"] < 1
    assert was_busy({**record, "waited": 0.2}) and not was_busy({**record, "waited": 0.02})
    load = record["machine"]["cores"] + 2
    assert was_busy({**record, "waited": None, "load": load}) and not was_busy({**record, "waited": None, "load": 1})


QUICKLY = {
    ("compare",): ("summary.json", {"base", "full", "lora", "gralora-k2"}),
    ("analyze", "rank"): ("rank.json", {f"gralora-k{k}" for k in (1, 2, 4, 8)}),
    ("analyze", "outlier"): ("outlier.json", {"lora", "gralora-k2", "gralora-k4", "gralora-k8"}),
    ("analyze", "grid"): ("grid.json", {"lora", "gralora-k2"}),
}


@pytest.mark.parametrize(
    "words",
    [pytest.param(w, id="-".join(w), marks=() if w == ("compare",) else pytest.mark.exhaustive) for w in QUICKLY],
)
def test_quick_runs_make_all_of_their_methods_with_two_seeds_and_claim_nothing(work, words, monkeypatch):
    """With the options of ``--quick``, but for the model and the length of its rows."""
    monkeypatch.setattr(runner.Runner, "_make", make_here)
    output = work / f"quick-{words[-1]}"
    own = ("--model", "model", "--data", "rows.jsonl", "--general-text", "general.txt", "--max-length", 64)
    done = call(*words, "--quick", "--output", output, *own, cwd=work)
    assert done.returncode == 0, done.stderr
    file, methods = QUICKLY[words]
    runs = [r["run"] for r in records(output) if r.get("run", {}).get("part") == MEASURE]
    assert {run["method"] for run in runs} == methods and {run["seed"] for run in runs} == {0, 1}
    content = json.loads((output / file).read_text())
    assert content["settings"]["quick"] and content["settings"]["seeds"] == 2
    assert all(found["verdict"] == findings.OUT_OF_REACH for found in content.get("findings", []))
    assert all("nothing can be said" in sentence for sentence in content.get("sentences", []))


@pytest.mark.parametrize("text", ["{}", '{"seeds": 3, "quick": false}', "[1", None])
def test_a_folder_with_another_programs_settings_is_left_alone(work, tmp_path, text):
    (tmp_path / "out").mkdir()
    settings = tmp_path / "out" / "settings.json"
    if text is None:
        settings.mkdir()
    else:
        settings.write_text(text)
    done = call("compare", *SMALL, "--output", str(tmp_path / "out"), cwd=work)
    assert done.returncode == 2 and "holds other files (settings.json), and no runs of gralora-ext" in sentence(done)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]
    assert text is None or settings.read_text() == text


def row_of(method, *values, diverged=0):
    metrics = {"loss": {"values": list(values)}} if values else {}
    return {"seeds": 3, "method": method, "label": method, "diverged": diverged, "metrics": metrics}


def test_what_diverged_beside_lora_is_said():
    rows = [row_of("lora", 1.0, 1.01, 1.02), row_of("dora", diverged=1), row_of("gralora-k2", 0.5, 0.51, 0.52)]
    assert findings.beside(rows, "loss", "Loss") == (
        "Loss: below lora's: gralora-k2; above lora's: none; not told apart from lora's: none; diverged: dora."
    )
    rows[1] = row_of("dora", 2.0, 2.1, 2.2, diverged=1)  # on the general text, so that it has a loss here
    assert "above lora's: dora; not told apart from lora's: none." in findings.beside(rows, "loss", "Loss")
    # t is 8.66: enough where there is one pair, from 4.3 on, and not where one of six would do, from 10.9 on.
    near = [row_of(name, 1.08, 1.11, 1.14) for name in ("dora", "gralora-k2", "gralora-k4", "a", "b", "c")]
    rows[0] = row_of("lora", 1.0, 1.01, 1.02)
    assert "above lora's: dora;" in findings.beside([rows[0], near[0]], "loss", "Loss")
    assert "above lora's: none;" in findings.beside([rows[0], *near], "loss", "Loss")
    rows[0] = row_of("lora", diverged=2)
    assert findings.beside(rows, "loss", "Loss") == "Loss: lora diverged, so that no method can be told apart from it."


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo before; echo the disk is on fire; exit 3", "the disk is on fire"),
        ("exit 3", "it ended with exit code 3"),
        ("echo before; kill -9 $$", "it was killed by SIGKILL"),
    ],
)
def test_what_a_failed_run_said_is_told(work, monkeypatch, script, said):
    program = work / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(program))
    done = call("compare", "--output", "failed", *SMALL, cwd=work)
    assert done.returncode == 2
    assert "the run base-measure" in sentence(done) and f"failed: {said}; its output is in" in sentence(done)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods", "loar"], "--methods: there is no loar (did you mean lora?); there are full, lora"),
        (["--validation-rows", "60"], "--validation-rows 60: rows.jsonl has 54 training rows, and some must remain"),
        (["--rank", "12"], "--rank 12: k = 8 does not divide the rank 12 of gralora-k8"),
        (
            ["--rank", "4", "--methods", "lora", "gralora-k8"],
            "--rank 4: k = 8 does not divide the rank 4 of gralora-k8",
        ),
        (
            ["--rank", "6", "--methods", "gralora-hybrid"],
            "--rank 6: k = 2 does not divide the rank 3 of gralora-hybrid",
        ),
        (["--general-text", "nowhere.txt"], "--general-text: nowhere.txt cannot be read"),
        (["--output", "model"], "--output: model holds other files"),
        (["--seeds", "0"], "argument --seeds: expected a whole number of at least 1, got '0'"),
        (["--lrs", "none"], "argument --lrs: expected a positive number, got 'none'"),
        (["--output", " "], "--output: expected a path, got an empty text"),
        (["--metods", "lora"], "(did you mean --methods?)"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(work, arguments, expected):
    done = call("compare", *SMALL, *arguments, cwd=work)
    assert done.returncode == 2 and expected in sentence(done)
