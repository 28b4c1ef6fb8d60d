# SPDX-License-Identifier: Apache-2.0
"""A job in several processes computes what it does in one, and ends whole whatever happens to one of them."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from cli_helpers import call, environment, finish, make_data, make_model, metrics, same_end, sentence, start
from several_helpers import (
    JOB,
    ONE,
    TWO,
    far,
    make_configurations,
    rank_of,
    run_several,
    signal_at,
    start_several,
    tokens,
)

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed")
CLOSE = 1e-5
PROCESSES = ("--num-processes", 2)
# 24 steps over several epochs, with dropout, so that each process's random numbers take part.
SHARED_DROPOUT = (*JOB, *TWO, "--steps", 24, "--dropout", 0.1)
DROPOUT = (*SHARED_DROPOUT, *PROCESSES)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    make_configurations(folder)
    return folder


@pytest.fixture(scope="module")
def one(work: Path) -> Path:
    """Twelve steps in one process."""
    assert call(*JOB, *ONE, "--steps", 12, "--output", "one", cwd=work).returncode == 0
    return work / "one"


@pytest.fixture(scope="module")
def ddp(work: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    words = (*JOB, *TWO, *PROCESSES, "--steps", 12, "--output", "ddp")
    return work / "ddp", run_several(*words, cwd=work)


@pytest.fixture(scope="module")
def fsdp2(work: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    words = (*JOB, *TWO, "--accelerate-config", "fsdp2.yaml", "--steps", 12, "--output", "fsdp2", "--merge")
    return work / "fsdp2", run_several(*words, cwd=work)


@pytest.fixture(scope="module")
def unbroken(work: Path) -> Path:
    """A job with dropout in two processes that ran to its end."""
    run_several(*DROPOUT, "--output", "unbroken", cwd=work)
    return work / "unbroken"


def test_two_processes_have_the_losses_of_one(one, ddp):
    assert far(ddp[0], one) <= CLOSE
    assert tokens(ddp[0]) == tokens(one)
    assert "(2 processes, ddp)" in ddp[1].stdout and ddp[1].stderr == ""
    assert metrics(ddp[0])["processes"] == 2


def test_one_process_speaks_and_writes(one, ddp):
    lines = ddp[1].stdout.splitlines()
    assert sum("importing" in line for line in lines) == 1
    assert sum("step 12/12" in line for line in lines) == 1
    assert {p.name for p in ddp[0].iterdir()} == {p.name for p in one.iterdir()}
    assert metrics(ddp[0])["samples"] == metrics(one)["samples"]


@pytest.mark.long
def test_fsdp2_has_the_losses_of_one_process(one, fsdp2):
    assert far(fsdp2[0], one) <= CLOSE
    assert tokens(fsdp2[0]) == tokens(one)
    assert "(2 processes, fsdp2)" in fsdp2[1].stdout and fsdp2[1].stderr == ""
    assert metrics(fsdp2[0])["samples"] == metrics(one)["samples"]


@pytest.mark.long
def test_fsdp2_merges_what_it_has_trained(fsdp2):
    assert metrics(fsdp2[0])["merged_logits"]["relative"] <= 1e-5
    assert (fsdp2[0] / "merged" / "model.safetensors").is_file()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("engine", [("--num-processes", "2"), ("--accelerate-config", "fsdp2.yaml")])
def test_two_cuda_devices_have_the_losses_of_one(work, engine):
    for name, devices, words in (("cuda1", "0", ONE), (f"cuda2-{engine[0][2:5]}", "0,1", (*TWO, *engine))):
        words = (*words, "--device", "cuda", "--steps", 12, "--output", name)
        run_several(*JOB, *words, cwd=work, devices=devices)
    assert far(work / name, work / "cuda1") <= 1e-3


@needs_deepspeed
@pytest.mark.parametrize(
    "stage", [pytest.param(2, marks=pytest.mark.exhaustive), pytest.param(3, marks=pytest.mark.long)]
)
def test_zero_has_the_losses_of_one_process(work, one, stage):
    output = work / f"zero{stage}"
    words = (*JOB, *TWO, "--accelerate-config", f"zero{stage}.yaml", "--steps", 12, "--output", output.name, "--merge")
    assert "(2 processes, deepspeed)" in run_several(*words, cwd=work).stdout
    assert far(output, one) <= CLOSE
    assert tokens(output) == tokens(one)
    assert metrics(output)["merged_logits"]["relative"] <= 1e-5


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.long)])
def test_checkpoint_of_two_processes_is_one_that_a_single_process_goes_on_from(work, one, engine, request):
    """The one that the first job has left at its eighth step, and four steps more: with the losses of all at once."""
    output, _ = request.getfixturevalue(engine)
    again = shutil.copytree(output, work / f"{engine}-one")
    shutil.rmtree(again / "checkpoints" / "checkpoint-12")
    result = call(*JOB, *ONE, "--steps", 12, "--output", again.name, "--resume", cwd=work)
    assert "checkpoint-8, 8 of 12 steps done" in result.stdout
    assert far(again, one) <= CLOSE


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", [PROCESSES, ("--accelerate-config", "fsdp2.yaml")])
def test_two_processes_go_on_from_one(work, one, engine):
    again = shutil.copytree(one, work / f"one-two-{engine[0][2:5]}")
    shutil.rmtree(again / "checkpoints" / "checkpoint-12")
    result = run_several(*JOB, *TWO, *engine, "--steps", 12, "--output", again.name, "--resume", cwd=work)
    assert "checkpoint-8, 8 of 12 steps done" in result.stdout
    assert far(again, one) <= CLOSE


def test_another_number_of_processes_needs_as_many_rows_in_a_step(work, ddp):
    result = call(*JOB, *TWO, "--steps", 14, "--output", "ddp", "--resume", cwd=work)
    assert result.returncode == 2
    assert "checkpoint-12 was made with 4 rows a step (now 2: --batch-size x --grad-accum x 1 processes)" in sentence(
        result
    )


@pytest.mark.long
def test_sigterm_to_one_process_ends_all_with_a_checkpoint_that_goes_on_bit_for_bit(work, unbroken):
    result = signal_at("step 1/", 1, signal.SIGTERM, *DROPOUT, "--output", "terminated", cwd=work)
    assert result.returncode == 128 + signal.SIGTERM
    assert "is saved; go on with" in sentence(result)
    assert not list((work / "terminated").rglob(".partial-*"))
    again = ("finetune", "--config", "terminated/finetune.json", "--resume")  # what the sentence says
    assert " ".join(again) in sentence(result)
    assert "resuming from" in run_several(*again, cwd=work).stdout
    same_end(work / "terminated", unbroken)


@pytest.mark.long
def test_killed_process_ends_all_with_one_sentence(work, unbroken):
    result = signal_at("step 1/", 1, signal.SIGKILL, *DROPOUT, "--output", "killed", cwd=work, delay=0.3)
    assert result.returncode == 128 + signal.SIGKILL
    assert "gralora-ext: error: process 1 of 2 was ended by SIGKILL: " in sentence(result)
    run_several(*DROPOUT, "--output", "killed", "--resume", cwd=work)
    same_end(work / "killed", unbroken)


@pytest.mark.parametrize(
    ("text", "signum"),
    [
        pytest.param("step 1/", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("step 1/", signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param("importing", signal.SIGINT, marks=pytest.mark.exhaustive),
        pytest.param("importing", signal.SIGTERM, marks=pytest.mark.exhaustive),
    ],
)
def test_signal_to_the_launcher_ends_all_as_one_process(work, text, signum):
    output = f"{text.split()[0]}-{signum.name}"
    result = signal_at(text, None, signum, *DROPOUT, "--output", output, cwd=work, delay=0.2)
    assert result.returncode == 128 + signum
    told = [line for line in result.stderr.splitlines() if line]
    assert [line.split(":")[0] for line in told if "stopping after" not in line] == [
        f"stopped by {'Ctrl-C' if signum == signal.SIGINT else signum.name}"
    ]
    assert ("is saved; go on with" in told[-1]) == (text != "importing")
    assert not list(work.glob(f"{output}/**/.partial-*"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", range(20))
def test_process_killed_at_any_moment_and_resumed_has_the_unbroken_losses(work, unbroken, moment):
    drawn = random.Random(moment)
    output, rank = f"moment{moment}", drawn.randrange(2)
    signum = drawn.choice((signal.SIGKILL, signal.SIGTERM))
    # From the start to somewhat after the last step.
    text, most = drawn.choice((("data:", 4.0), ("adapter:", 2.0), ("step 1/", 2.0), ("step 1/", 2.0), ("step 1/", 4.0)))
    result = signal_at(text, rank, signum, *DROPOUT, "--output", output, cwd=work, delay=drawn.uniform(0, most))
    assert result.returncode in (0, 128 + signum)
    assert "Traceback" not in result.stderr
    told = [line for line in result.stderr.splitlines() if line and "stopping after the step in hand" not in line]
    assert len(told) == (result.returncode != 0)
    if result.returncode:
        run_several(*DROPOUT, "--output", output, "--resume", cwd=work)
    same_end(work / output, unbroken)


@pytest.mark.long
def test_shared_model_goes_on_to_the_last_bit(work, fsdp2):
    """Without dropout; the random numbers, and a job that was killed, are for the next test."""
    again = shutil.copytree(fsdp2[0], work / "fsdp2-again")
    shutil.rmtree(again / "checkpoints" / "checkpoint-12")
    words = (*JOB, *TWO, "--accelerate-config", "fsdp2.yaml", "--steps", 12, "--output", again.name, "--resume")
    assert "checkpoint-8, 8 of 12 steps done" in run_several(*words, cwd=work).stdout
    same_end(again, fsdp2[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_shared_model_killed_and_resumed_has_the_unbroken_losses(work, engine):
    job = (*SHARED_DROPOUT, "--accelerate-config", f"{engine}.yaml")
    run_several(*job, "--output", f"{engine}-unbroken", cwd=work)
    for signum, text in ((signal.SIGTERM, "step 1/"), (signal.SIGKILL, "after 8 steps")):
        output = f"{engine}-{signum.name}"
        result = signal_at(text, 1, signum, *job, "--output", output, cwd=work, delay=0.2)
        assert result.returncode == 128 + signum, result.stderr
        assert "resuming from" in run_several(*job, "--output", output, "--resume", cwd=work).stdout
        same_end(work / output, work / f"{engine}-unbroken")


@pytest.mark.long
def test_process_that_does_not_answer_is_given_up(work):
    words = (*DROPOUT, "--output", "stuck", "--process-timeout", 6)
    result = signal_at("step 1/", 1, signal.SIGSTOP, *words, cwd=work)
    assert result.returncode == 1
    assert "process 1 of 2 did not answer for 6 s: " in sentence(result)


def test_mistake_is_told_by_one_process(work):
    """One that both processes see, when they have loaded the tokenizer."""
    result = run_several(*JOB, *TWO, *PROCESSES, "--max-length", 4, "--output", "wrong", cwd=work, code=2)
    assert "leaves no room" in sentence(result)
    assert not (work / "wrong").exists()


def test_mistake_on_one_machine_is_told_by_the_first(work):
    """Two processes as any launcher starts them, the second one where there is no such file."""
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "GLOO_SOCKET_IFNAME": "lo"}
    first, second = (
        start(*JOB, *TWO, cwd=folder, env=environment(**place, RANK=str(rank), LOCAL_RANK=str(rank)))
        for rank, folder in enumerate((work, elsewhere))
    )
    results = finish(first), finish(second)
    assert [result.returncode for result in results] == [2, 0]
    assert "error: process 1 of 2: --data: there is no file data.jsonl" in sentence(results[0])
    assert results[1].stderr == results[1].stdout == ""


def test_folder_in_use_is_told_by_one_process(work, ddp):
    with open(ddp[0] / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_several(*JOB, *TWO, *PROCESSES, "--output", "ddp", cwd=work, code=2)
    assert "is in use by another gralora-ext job" in sentence(result)


def test_launcher_that_is_killed_leaves_no_process_behind(work):
    process = start_several(*DROPOUT, "--output", "orphans", cwd=work)
    ranks = [rank_of(process, rank) for rank in range(2)]
    time.sleep(1.0)  # by then each has told the system
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.exhaustive
def test_job_that_diverges_and_job_whose_disk_is_full_are_told_by_one_process(work):
    result = run_several(*JOB, *TWO, *PROCESSES, "--lr", 1e30, "--output", "diverged", cwd=work, code=3)
    assert "the job has diverged: " in sentence(result)
    assert metrics(work / "diverged")["diverged"]

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    result = run_several(*JOB, *TWO, *PROCESSES, "--r", 16, "--output", "full", cwd=work, code=2, preexec_fn=full)
    assert "cannot be written: File too large (" in sentence(result)
    assert not list((work / "full").rglob(".partial-*"))
