# SPDX-License-Identifier: Apache-2.0
"""Only what the job wrote is replaced or deleted: what a user put there, or changed, stays, and a line says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_helpers import call, make_data, make_model

from gralora_ext.cli.output import Output
from gralora_ext.program.files import locked, staged

pytestmark = pytest.mark.usefixtures("no_plot")
JOB = ("finetune", "--model", "model", "--data", "data.jsonl", "--steps", 2, "--save-every", 1, "--eval-rows", 2)
JOB += ("--max-length", 64, "--sample-tokens", 2, "--output", "out")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    assert call(*JOB, cwd=folder).returncode == 0
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "work")


def job(work: Path, *more: object) -> set[str]:
    """Runs the job again; returns what it says that it kept."""
    result = call(*JOB, *more, cwd=work)
    assert result.returncode == 0, result.stderr
    marks = [
        line.split("kept, since no job wrote it, or it was changed since: ")[1:] for line in result.stdout.splitlines()
    ]
    return {mark[0] for mark in marks if mark}


def test_rerun_keeps_a_users_files_wherever_they_lie(work):
    out = work / "out"
    (out / "adapter" / "notes").mkdir()
    for place in (
        "notes.txt",
        "adapter/notes/a.txt",
        "merged/b.txt",
        "checkpoints/c.txt",
        "checkpoints/checkpoint-2/d.txt",
    ):
        (out / place).write_text(place)
    (out / "checkpoints" / "checkpoint-best").mkdir()
    (out / "checkpoints" / "checkpoint-best" / "adapter_model.safetensors").write_text("best")
    (out / "checkpoints" / "checkpoint-7").mkdir()
    (out / "checkpoints" / "checkpoint-9").mkdir()
    (out / "checkpoints" / "checkpoint-7" / "mine").write_text("7")
    before = {p: p.read_text() for p in out.rglob("*.txt")}
    kept = job(work, "--seed", 1)
    assert {p: p.read_text() for p in before} == before
    assert (out / "checkpoints" / "checkpoint-best" / "adapter_model.safetensors").read_text() == "best"
    assert (out / "checkpoints" / "checkpoint-7" / "mine").read_text() == "7"
    assert kept == {"out/adapter/notes/a.txt", "out/merged/b.txt", "out/checkpoints/checkpoint-2/d.txt"} | {
        "out/checkpoints/checkpoint-2",
        "out/checkpoints/checkpoint-7",
        "out/checkpoints/checkpoint-9",
        "out/checkpoints/checkpoint-best",
        "out/checkpoints/c.txt",
    }
    assert job(work, "--no-merge") >= {"out/merged"}
    assert [p.name for p in (out / "merged").iterdir()] == ["b.txt"]


def test_what_a_user_changed_or_put_in_the_way_is_kept_beside(work):
    out = work / "out"
    (out / "adapter" / "README.md").write_text("my model card")
    (out / "metrics.json").write_text("my figures")
    shutil.rmtree(out / "merged")
    (out / "merged").write_text("my file")
    assert job(work, "--lr", 0.01) == {"out/adapter/README.md.kept", "out/metrics.json.kept", "out/merged.kept"}
    assert (out / "adapter" / "README.md.kept").read_text() == "my model card"
    assert (out / "metrics.json.kept").read_text() == "my figures"
    assert (out / "merged.kept").read_text() == "my file" and (out / "merged" / "config.json").is_file()


def test_links_are_kept_and_nothing_is_deleted_behind_them(work):
    out = work / "out"
    for name in ("adapter", "merged"):
        (out / name).rename(work / name)
        (out / name).symlink_to(work / name)
    job(work)
    assert (out / "adapter.kept").is_symlink() and (work / "adapter" / "adapter_model.safetensors").is_file()
    shutil.rmtree(out / "merged")
    (out / "merged").symlink_to(work / "merged")
    job(work, "--no-merge")
    assert (work / "merged" / "model.safetensors").is_file()


def test_rerun_over_untouched_results_leaves_nothing_behind(work):
    before = {p.relative_to(work) for p in (work / "out").rglob("*")}
    assert job(work, "--lr", 0.01) == set()
    assert {p.relative_to(work) for p in (work / "out").rglob("*")} == before
    assert job(work, "--no-merge") == set()
    assert not (work / "out" / "merged").exists()


def test_copied_results_are_still_known_as_the_jobs(work):
    shutil.copytree(work / "out", work / "copy", copy_function=shutil.copyfile)
    assert job(work, "--output", "copy", "--lr", 0.01) == set()


def test_results_of_a_version_without_a_record_are_kept_beside(work):
    (work / "out" / ".written.json").unlink()
    assert {"out/adapter.kept", "out/merged.kept"} <= job(work, "--lr", 0.01)
    assert (work / "out" / "merged.kept" / "model.safetensors").is_file()


def test_folder_that_a_killed_process_had_moved_away_comes_back(tmp_path):
    """It was killed between the two renames that put a new folder into the place of an old one."""
    (tmp_path / ".partial-x" / "adapter.old").mkdir(parents=True)
    (tmp_path / ".partial-x" / "adapter.old" / "mine").write_text("1")
    (tmp_path / ".partial-x" / "adapter").mkdir()
    with locked(tmp_path, wait=False):
        assert (tmp_path / "adapter" / "mine").read_text() == "1"
        assert not (tmp_path / ".partial-x").exists()


def test_failed_work_moves_nothing_of_a_users(tmp_path):
    output = Output(tmp_path, print)
    (tmp_path / "f").write_text("mine")
    with pytest.raises(ValueError), output.staged() as stage:
        (stage / "f").write_text("new")
        raise ValueError
    assert {p.name for p in tmp_path.iterdir()} == {"f"} and (tmp_path / "f").read_text() == "mine"
    with staged(tmp_path, output) as stage:
        (stage / "f").write_text("mine")
    assert {p.name for p in tmp_path.iterdir()} == {"f"}, "what has the same bytes needs no second copy"
