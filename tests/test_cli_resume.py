# SPDX-License-Identifier: Apache-2.0
"""A resumed job ends like the unbroken one, whatever has happened to its checkpoints, or it does not go on at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cli_helpers import CHAT, call, make_chat_data, make_chat_model, make_data, make_model, metrics, same_end, sentence
from safetensors.torch import load_file, save_file

from gralora_ext.program.errors import JobError
from gralora_ext.program.files import locked

pytestmark = pytest.mark.usefixtures("no_plot")
# The rate rises over ten steps, and a row is dropped out: scheduler, optimizer and random numbers
# all decide the losses.
JOB = ("finetune", "--model", "model", "--data", "data.jsonl", "--batch-size", 2, "--dropout", 0.1, "--hybrid-r", 2)
JOB += ("--r", 4, "--lr", 0.02, "--lr-schedule", "constant", "--warmup-steps", 10, "--max-length", 64)
JOB += ("--eval-every", 4, "--save-every", 4, "--sample-tokens", 4, "--no-merge")
FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "gralora_ext.json",
    "manifest.json",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of 12 steps that ran to its end, and the same one as it was after 8: with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("resume")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    for name, steps in (("unbroken", 12), ("half", 8)):
        assert call(*JOB, "--steps", steps, "--output", name, cwd=folder).returncode == 0
    return folder


class Broken(NamedTuple):
    """A copy of the job at its half, to be broken and resumed; ``new`` and ``old`` are its two checkpoints."""

    work: Path
    output: Path
    new: Path
    old: Path

    def resume(self) -> object:
        return call(*JOB, "--steps", 12, "--output", self.output, "--resume", cwd=self.work)

    def ends_like_the_unbroken_one(self, *told: str) -> None:
        result = self.resume()
        assert result.returncode == 0, result.stderr
        assert all(text in result.stdout for text in told), result.stdout
        same_end(self.output, self.work / "unbroken")
        names = {p.name for p in self.old.parent.iterdir()} - {"checkpoint-8.kept"}  # where its manifest did not tell
        assert names == {"checkpoint-12", "checkpoint-8"}


@pytest.fixture
def job(work: Path, tmp_path: Path) -> Broken:
    output = shutil.copytree(work / "half", tmp_path / "out")
    folder = output / "checkpoints"
    return Broken(work, output, folder / "checkpoint-8", folder / "checkpoint-4")


def cut(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)


def exchange(file: Path, other: Path) -> None:
    shutil.copy(other, file)


def delete(file: Path, other: Path) -> None:
    file.unlink()


# Each damage and each file.
DAMAGES = (delete, cut, empty, flip, exchange)
SHOWN = (*zip(FILES, (*DAMAGES, *DAMAGES), strict=False), ("optimizer.pt", flip), ("README.md", exchange))


@pytest.mark.parametrize(("file", "damage"), SHOWN)
def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(job, damage, file):
    same = damage is exchange and file in ("README.md", "adapter_config.json")  # they do not change from step to step
    damage(job.new / file, job.old / file)
    damaged = f"checkpoint-8 is damaged and left aside: {file} "
    job.ends_like_the_unbroken_one(f"checkpoint-{8 if same else 4}, ", *([] if same else [damaged]))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def changed(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, checkpoint / "adapter_model.safetensors")

    return changed


def change_optimizer(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def changed(checkpoint: Path) -> None:
        values = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        change(values)
        torch.save(values, checkpoint / "optimizer.pt")

    return changed


def change_manifest(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def changed(checkpoint: Path) -> None:
        values = json.loads((checkpoint / "manifest.json").read_text())
        change(values)
        (checkpoint / "manifest.json").write_text(json.dumps(values))

    return changed


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


BY_CONTENT = {
    "a renamed tensor": change_tensors(lambda t: t.update({first(t) + "x": t.pop(first(t))})),
    "a tensor of zeros": change_tensors(lambda t: t[first(t)].zero_()),
    "another rate": change_optimizer(lambda o: o["param_groups"][0].update(lr=1.0)),
    "a manifest without the optimizer": change_manifest(lambda m: m["files"].pop("optimizer.pt")),
    "a manifest with another size": change_manifest(lambda m: m["files"]["scheduler.pt"].update(bytes=1)),
    "a manifest that leads out": change_manifest(lambda m: m["files"].update({"../../x": {"bytes": 0, "sha256": ""}})),
    "a manifest of other types": change_manifest(lambda m: m.update(files=[1])),
    "a manifest nested too deep": lambda c: (c / "manifest.json").write_text("[" * 100_000),
    "the whole of another step": lambda c: (shutil.rmtree(c), shutil.copytree(c.parent / "checkpoint-4", c)),
    "a folder in place of a file": lambda c: ((c / "scheduler.pt").unlink(), (c / "scheduler.pt").mkdir()),
    "nothing": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("name", BY_CONTENT)
def test_checkpoint_of_other_content_is_left_aside(job, name):
    BY_CONTENT[name](job.new)
    job.ends_like_the_unbroken_one("checkpoint-8 is damaged and left aside: ", "checkpoint-4, 4 of 12 steps done")


def test_where_no_checkpoint_is_whole_nothing_is_trained_and_nothing_lost(job):
    file = "optimizer.pt"
    (job.new / file).unlink()
    (job.old / file).write_bytes(b"")
    before = {p: p.read_bytes() for p in job.output.rglob("*") if p.is_file()}
    result = job.resume()
    assert result.returncode == 2
    assert f"no checkpoint in {job.new.parent} is whole (checkpoint-8: {file} is missing" in sentence(result)
    assert "leave out --resume to start anew from the first step" in sentence(result)
    assert {p: p.read_bytes() for p in job.output.rglob("*") if p.is_file()} == before


def test_what_a_user_puts_into_a_checkpoint_is_neither_read_nor_deleted(job, tmp_path):
    save_file({"x": torch.zeros(1)}, job.new / "model.safetensors")  # stock code would load it in place of the adapter
    (job.old / "notes.txt").write_text("mine")
    result = job.resume()
    assert result.returncode == 0, result.stderr
    same_end(job.output, job.work / "unbroken")
    assert (job.new / "model.safetensors").is_file()
    assert [p.name for p in job.old.iterdir()] == ["notes.txt"]
    assert f"kept, since no job wrote it, or it was changed since: {job.old}" in result.stdout


def test_checkpoint_whose_manifest_was_lost_is_kept_beside_its_successor(job):
    (job.new / "manifest.json").unlink()
    result = job.resume()
    assert result.returncode == 0, result.stderr
    same_end(job.output, job.work / "unbroken")
    assert (job.new.with_name("checkpoint-8.kept") / "optimizer.pt").is_file()
    assert "checkpoint-8.kept" in result.stdout and "older versions of gralora_ext wrote none" in result.stdout


def test_adapter_of_other_tensors_is_an_error(job):
    """As where another version of PEFT names them otherwise: the file is whole, and does not fit."""
    from gralora_ext.cli.checkpoints import MANIFEST, NEEDED, Checkpoints

    for checkpoint in (job.new, job.old):
        BY_CONTENT["a renamed tensor"](checkpoint)
        (checkpoint / MANIFEST).unlink()
        Checkpoints(checkpoint.parent, print).seal(checkpoint)
        assert (checkpoint / MANIFEST).is_file() and (checkpoint / NEEDED[0]).is_file()
    result = job.resume()
    assert result.returncode == 2
    assert "checkpoint-8 is not a checkpoint of this adapter: " in sentence(result)
    assert "is missing" in sentence(result)


def test_a_job_that_is_made_longer_has_the_rates_of_one_that_was_as_long(work: Path, tmp_path: Path) -> None:
    """From its first new step on: the rate that its checkpoint holds is that of the old length's end."""
    job = (*JOB, "--lr-schedule", "linear", "--warmup-steps", 1, "--save-every", 1, "--output")
    assert call(*job, tmp_path / "long", "--steps", 4, cwd=work).returncode == 0
    assert call(*job, tmp_path / "out", "--steps", 3, cwd=work).returncode == 0
    assert call(*job, tmp_path / "out", "--steps", 4, "--resume", cwd=work).returncode == 0
    long, out = ([e["learning_rate"] for e in metrics(tmp_path / name)["losses"]] for name in ("long", "out"))
    assert out[3] == long[3] > 0 and out[2] != long[2]
    checkpoints = tmp_path / "out" / "checkpoints"
    before, after = (load_file(checkpoints / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (3, 4))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_rows_that_become_other_tokens_are_not_gone_on_with(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "model")
    make_chat_data(tmp_path / "data.jsonl")
    job = (*JOB, "--output", "out", "--resume", "--steps")
    assert call(*job, 2, cwd=tmp_path).returncode == 0
    make_chat_model(tmp_path / "model", CHAT.replace("{%", "Today is Monday. {%", 1))
    changed = call(*job, 4, cwd=tmp_path)
    assert changed.returncode == 2 and "was made with other tokens of the same rows" in sentence(changed)
    make_chat_model(tmp_path / "model")
    assert call(*job, 4, cwd=tmp_path).returncode == 0


def test_a_job_with_rows_to_hold_out_goes_on_by_the_command_that_it_prints(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl")
    make_data(tmp_path / "other.jsonl", 8)
    job = [*JOB, "--eval-data", "other.jsonl", "--output", "out"]
    assert call(*job, "--steps", 1, cwd=tmp_path).returncode == 0
    again = ("finetune", "--config", "out/finetune.json", "--resume", "--steps", 2)
    done = call(*again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 steps done" in done.stdout


def test_model_and_rows_may_lie_elsewhere_than_they_did(work: Path, tmp_path: Path) -> None:
    """As on another machine, or where a link leads elsewhere."""
    shutil.copytree(work / "half", tmp_path / "out")
    shutil.copytree(work / "model", tmp_path / "moved" / "other name")
    shutil.copy(work / "data.jsonl", tmp_path / "rows.jsonl")
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "rows.jsonl")
    job = [*JOB, "--steps", 12, "--output", "out", "--resume"]
    job[job.index("model")], job[job.index("data.jsonl")] = "moved/other name", "linked.jsonl"
    done = call(*job, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    same_end(tmp_path / "out", work / "unbroken")
    settings = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert settings["data"] == str(tmp_path / "linked.jsonl")


def test_a_base_with_other_weights_is_not_gone_on_with(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "half", tmp_path / "out")
    shutil.copytree(work / "model", tmp_path / "model")
    shutil.copy(work / "data.jsonl", tmp_path / "data.jsonl")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("1.mlp.up_proj.weight"))
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    refused = call(*JOB, "--steps", 12, "--output", "out", "--resume", cwd=tmp_path)
    assert refused.returncode == 2 and "was made with other weights of the base" in sentence(refused)
    state = tmp_path / "out" / "checkpoints" / "checkpoint-8"
    assert state.is_dir() and metrics(tmp_path / "out")["steps"] == 8


def test_a_job_that_begins_anew_says_what_it_deletes_and_until_then_the_earlier_one_can_go_on(job, monkeypatch):
    def broken(*args, **how):
        raise JobError("the power went off")

    with monkeypatch.context() as patched:
        patched.setattr("gralora_ext.cli.trainer.FinetuneTrainer.training_step", broken)
        anew = call(*JOB, "--steps", 12, "--lr", 0.01, "--output", job.output, cwd=job.work)
    assert anew.returncode == 2 and "the power went off" in sentence(anew)
    assert f"{job.new} is of an earlier job: this one begins anew, and deletes that" in anew.stdout
    settings = job.output / "finetune.json"
    assert json.loads(settings.read_text())["lr"] == 0.02, "of the checkpoints beside it"
    again = ("finetune", "--config", settings, "--resume", "--steps", 12, "--output", job.output)
    result = call(*again, cwd=job.work)
    assert result.returncode == 0, result.stderr
    assert "of an earlier job" not in result.stdout
    same_end(job.output, job.work / "unbroken")
    result = call(*JOB, "--steps", 4, "--lr", 0.01, "--output", job.output, cwd=job.work)
    assert result.returncode == 0 and json.loads(settings.read_text())["lr"] == 0.01
    assert [path.name for path in job.old.parent.iterdir()] == ["checkpoint-4"]


def test_a_folder_in_use_is_told_before_a_model_is_looked_for(job):
    before = {path: path.stat().st_mtime_ns for path in job.output.rglob("*")}
    with locked(job.output, wait=False):
        result = call(*JOB, "--model", "nowhere", "--output", job.output, cwd=job.work)
    assert result.returncode == 2 and "is in use by another gralora-ext job" in sentence(result)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items() if path.is_file() and path.name != ".lock")


def test_checkpoints_that_will_be_deleted_count_as_free(job, monkeypatch):
    """Twelve bytes a parameter each, and two of three are there already."""
    parameters = metrics(job.work / "half")["trainable_parameters"]
    monkeypatch.setattr("gralora_ext.cli.job.free_bytes", lambda folder: 2**23 + 6 * 4 * parameters)
    assert job.resume().returncode == 0
    anew = call(*JOB, "--steps", 2, "--output", job.output.with_name("new"), cwd=job.work)
    assert anew.returncode == 2 and "MiB free, and this job writes up to" in sentence(anew)
