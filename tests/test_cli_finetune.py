# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext finetune`` from end to end, on a tiny random model: in a process of its own where that counts."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_helpers import call, environment, make_data, make_model, metrics, run, same_end, sentence, stop_at, until

from gralora_ext.cli.report import draw

pytestmark = pytest.mark.usefixtures("no_plot")  # in this process; those of their own draw it
STEPS = 40
# Dropout, two passes in a step, several epochs and a short last step in each: whatever a resumed
# job could continue wrongly takes part.
JOB = (
    "--steps",
    STEPS,
    "--batch-size",
    2,
    "--grad-accum",
    1,
    "--dropout",
    0.1,
    "--hybrid-r",
    2,
    "--r",
    4,
    "--lr",
    0.02,
)
JOB += ("--max-length", 64, "--eval-every", 15, "--save-every", 7, "--sample-tokens", 8, "--seed", 3)

STOCK = """
import json, sys, warnings
warnings.simplefilter("error")
warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of names that transformers is giving up
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
output = sys.argv[1]
with open(f"{output}/adapter/adapter_config.json") as file:
    base = json.load(file)["base_model_name_or_path"]
tokenizer = AutoTokenizer.from_pretrained(f"{output}/merged")
ids = tokenizer("4 times cat?\\n", return_tensors="pt")["input_ids"]
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f"{output}/adapter").eval()
merged = AutoModelForCausalLM.from_pretrained(f"{output}/merged").eval()
plain = AutoModelForCausalLM.from_pretrained(base).eval()
with torch.no_grad():
    logits = [model(input_ids=ids).logits for model in (adapted, merged, plain)]
print(json.dumps({
    "merged": (logits[0] - logits[1]).abs().max().item(),
    "plain": (logits[0] - logits[2]).abs().max().item(),
    "ours": any(name.startswith("gralora_ext") for name in sys.modules),
}))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes have it: runs here have the same bits as theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    return folder


def run_here(*words: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = call(*words, cwd=cwd)
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def arguments(output: str, *more: object) -> tuple[object, ...]:
    return ("finetune", "--model", "model", "--data", "data.jsonl", "--output", output, *JOB, *more)


@pytest.fixture(scope="module")
def unbroken(work: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A job that ran to its end."""
    return work / "unbroken", run(*arguments("unbroken"), cwd=work)


@pytest.fixture(scope="module")
def stopped(work: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The same job, stopped by SIGTERM after its first step."""
    return work / "stopped", stop_at("step 1/", signal.SIGTERM, *arguments("stopped"), cwd=work)


def test_job_writes_what_it_promises_and_nothing_else(unbroken):
    output, _ = unbroken
    names = {path.name for path in output.iterdir()}
    assert names == {
        "adapter",
        "merged",
        "metrics.json",
        "loss.png",
        "finetune.json",
        "checkpoints",
        ".lock",
        ".written.json",
    }
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["checkpoint-35", "checkpoint-40"]


def test_metrics_tell_the_whole_run(unbroken):
    values = metrics(unbroken[0])
    assert [e["step"] for e in values["losses"]] == list(range(1, STEPS + 1))
    assert [e["step"] for e in values["eval_losses"]] == [0, 15, 30, STEPS]
    assert values["eval_loss_fall"] == pytest.approx(values["eval_loss_before"] - values["eval_loss_after"])
    assert values["eval_loss_fall"] > 0.5
    assert values["tokens"] == sum(e["tokens"] for e in values["losses"]) > 0
    assert values["tokens_per_second"] > 0 and values["peak_memory_mib"]["host"] > 50
    assert values["steps"] == STEPS and values["config"]["lr"] == 0.02
    assert values["epochs"] == STEPS / math.ceil(values["train_rows"] / 2)
    assert {"gralora_ext", "torch", "peft", "transformers", "python"} <= values["versions"].keys()
    assert len(values["samples"]) == 2
    assert all({"prompt", "reference", "before", "after"} <= sample.keys() for sample in values["samples"])


def test_the_merged_models_configuration_is_that_of_the_base(work, unbroken):
    base, merged = (
        json.loads((folder / "config.json").read_text()) for folder in (work / "model", unbroken[0] / "merged")
    )
    assert base["use_cache"] is True
    assert {**merged, "transformers_version": base["transformers_version"]} == base


def test_a_name_with_dollar_signs_is_no_formula(unbroken, tmp_path):
    draw({**metrics(unbroken[0]), "data": "cost_$_of_$^^.jsonl"}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_fused_layers_are_used_and_match_pefts_own(work, unbroken):
    run_here(*arguments("peft", "--backend", "peft", "--dropout", 0, "--steps", 12, "--no-merge"), cwd=work)
    run_here(*arguments("fused", "--dropout", 0, "--steps", 12, "--no-merge"), cwd=work)
    for ours, theirs in zip(metrics(work / "fused")["losses"], metrics(work / "peft")["losses"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert "GraLoRA, fused" in unbroken[1].stdout
    assert not (work / "fused" / "merged").exists()


def test_progress_shows_loss_and_speed(unbroken):
    lines = unbroken[1].stdout.splitlines()
    assert any(re.search(rf"step 1/{STEPS}: loss [\d.]+, [\d,]+ tokens/s", line) for line in lines)
    assert any(re.search(rf"step {STEPS}/{STEPS}: loss", line) for line in lines)
    assert unbroken[1].stderr == ""


def test_plot_shows_something(unbroken):
    from matplotlib.image import imread

    image = imread(unbroken[0] / "loss.png")
    assert image.shape[0] >= 400 and image.shape[1] >= 600
    assert len({tuple(pixel) for pixel in (image[::4, ::4, :3] * 15).astype(int).reshape(-1, 3)}) > 5


def test_results_load_in_stock_libraries_and_agree(work, unbroken):
    result = subprocess.run(
        [sys.executable, "-c", STOCK, str(unbroken[0])],
        cwd=work.parent,
        env=environment(HF_HUB_DISABLE_PROGRESS_BARS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["merged"] <= 1e-4
    assert found["plain"] > 0.01, "the adapter has learned nothing, so the comparison shows nothing"
    assert not found["ours"]
    assert metrics(unbroken[0])["merged_logits"]["relative"] <= 1e-5


def test_sigterm_saves_a_checkpoint_and_tells_how_to_go_on(stopped):
    output, result = stopped
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert 0 < int(checkpoint.name.split("-")[1]) < STEPS
    assert str(checkpoint.name) in result.stderr and "--resume" in result.stderr
    assert not (output / "metrics.json").exists() and not list(output.rglob(".partial-*"))


def test_resumed_job_ends_like_the_unbroken_one(work, unbroken, stopped):
    resumed = work / "resumed"
    shutil.copytree(stopped[0], resumed)
    # A torn checkpoint, as some crash could leave it: it is newer, and must not be taken.
    (resumed / "checkpoints" / "checkpoint-39").mkdir()
    (resumed / "checkpoints" / ".partial-x" / "checkpoint-38").mkdir(parents=True)
    # What the stopped job told the user to type, but for the copied folder: the settings come from
    # the file in there.
    assert "finetune --config stopped/finetune.json --resume`" in stopped[1].stderr
    result = run_here("finetune", "--config", "resumed/finetune.json", "--output", "resumed", "--resume", cwd=work)
    assert "resumed/checkpoints/checkpoint-39 is damaged and left aside: manifest.json is missing" in result.stdout
    assert "resuming from resumed/checkpoints/checkpoint-" in result.stdout
    same_end(resumed, unbroken[0])
    assert not list(resumed.rglob(".partial-*"))


@pytest.mark.parametrize("done", [35, pytest.param(40, marks=pytest.mark.exhaustive)])
def test_job_resumed_in_a_later_epoch_or_after_its_last_step_ends_like_the_unbroken_one(work, unbroken, done):
    late = work / f"late{done}"
    until(done, unbroken[0], late)
    result = run_here(*arguments(late.name, "--resume"), cwd=work)
    assert f"{done} of 40 steps done" in result.stdout
    same_end(late, unbroken[0])


def test_resume_refuses_an_end_that_has_passed(work, unbroken):
    result = run_here(*arguments("unbroken", "--resume", "--steps", 3), cwd=work, code=2)
    assert "checkpoint-40" in sentence(result) and "--steps 3" in sentence(result)


def test_ctrl_c_before_the_first_step_leaves_nothing(work):
    result = stop_at("importing", signal.SIGINT, *arguments("early"), cwd=work)
    assert result.returncode == 130
    assert "Ctrl-C" in sentence(result)
    assert not (work / "early").exists()


def test_resume_without_a_checkpoint_starts_from_the_first_step(work, unbroken):
    (work / "fresh" / "checkpoints").mkdir(parents=True)
    (work / "fresh" / "finetune.json").write_text("{}")
    result = run_here(*arguments("fresh", "--resume", "--steps", 2, "--backend", "lora"), cwd=work)
    assert "no checkpoint" in result.stdout
    values = metrics(work / "fresh")
    assert [e["step"] for e in values["losses"]] == [1, 2]
    assert json.loads((work / "fresh" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert values["trainable_parameters"] == metrics(unbroken[0])["trainable_parameters"]


@pytest.mark.parametrize("lost", ["pipe", pytest.param("terminal", marks=pytest.mark.exhaustive)])
def test_a_signal_whose_sender_has_taken_the_output_away_leaves_a_checkpoint(work, lost):
    """Ctrl-C ends `| tee` too, and a terminal that is closed sends SIGHUP: nothing can be written from then on."""
    if lost == "pipe":
        reader, writer = os.pipe()
        signum = signal.SIGINT
    else:
        reader, writer = os.openpty()
        signum = signal.SIGHUP
    process = subprocess.Popen(
        [sys.executable, "-m", "gralora_ext", *map(str, arguments(f"lost-{lost}"))],
        cwd=work, env=environment(), stdin=subprocess.DEVNULL, stdout=writer, stderr=writer,
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),  # noqa: PLW1509  in the background, or by nohup, it is ignored
    )  # fmt: skip
    os.close(writer)
    read = b""
    while b"step 1/" not in read:
        read += os.read(reader, 1 << 16)
    process.send_signal(signal.SIGSTOP)  # so that the signal finds the reader gone, and no write before it does
    os.close(reader)
    process.send_signal(signum)
    process.send_signal(signal.SIGCONT)
    assert process.wait(100) == 128 + signum
    assert [*(work / f"lost-{lost}" / "checkpoints").glob("checkpoint-*/manifest.json")]
    done = run_here(*arguments(f"lost-{lost}", "--resume"), cwd=work)
    assert "resuming from" in done.stdout
