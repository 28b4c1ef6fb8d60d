# SPDX-License-Identifier: Apache-2.0
"""What processes of a job know of each other before they meet: places, rows, and whose checkpoints they can read."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from several_helpers import make_configurations

from gralora_ext.cli.accelerate_file import read
from gralora_ext.cli.checkpoints import Checkpoints, History
from gralora_ext.cli.checks import check_shared, device
from gralora_ext.cli.group import LOST, Group
from gralora_ext.cli.job import Job
from gralora_ext.cli.launcher import Place, again, engine, place_here
from gralora_ext.cli.options import parse
from gralora_ext.cli.resume import _compare_processes, processes
from gralora_ext.cli.shares import ShareLoader, Shares, has_labels
from gralora_ext.cli.spawn import _Launch
from gralora_ext.program.errors import JobError

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch):
    """Sets a launcher's variables, and leaves no other one's."""

    def by(**variables: str) -> None:
        names = (
            "RANK",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "FSDP_VERSION",
            "TORCHELASTIC_RUN_ID",
        )
        of_accelerate = [name for name in os.environ if name.startswith("ACCELERATE_")]
        for name in (*SIZES, *names, *of_accelerate):
            monkeypatch.setenv(name, "")  # so that what the program sets is undone
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return by


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "node0"},
        {
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "MASTER_ADDR": "a",
        },
        {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MASTER_ADDR": "a"},
    ],
)
def test_each_launcher_tells_a_process_its_place(launched, variables):
    launched(**variables)
    assert place_here() == Place(3, 4, 1)
    assert [os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")] == ["4", "3", "1"]
    assert os.environ["MASTER_PORT"] == "29500"


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": ""}])
def test_a_process_without_others_has_the_first_place_of_one(launched, variables):
    launched(**variables)
    assert place_here() == Place(0, 1, 0)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK is not set, which is not one of them: start the job with"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "WORLD_SIZE is 2, and RANK is 2, which is not one of them"),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, "MASTER_ADDR is not set, and there are several machines"),
    ],
)
def test_a_launcher_that_tells_too_little_is_an_error(launched, variables, says):
    launched(**variables)
    with pytest.raises(JobError, match=says):
        place_here()


def test_engine_is_what_accelerate_says(launched):
    launched()
    assert engine(Place(0, 2)) == "ddp"
    launched(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert engine(Place(0, 2)) == "fsdp2"
    launched(ACCELERATE_USE_DEEPSPEED="true")
    assert engine(Place(0, 2)) == "deepspeed"
    with pytest.raises(JobError, match="shares a model out, and there is one process"):
        engine(Place(0, 1))
    launched(ACCELERATE_USE_FSDP="true")
    with pytest.raises(JobError, match="asks for FSDP 1"):
        engine(Place(0, 2))


@pytest.mark.parametrize("option", ["--load-in-4bit", "--load-in-8bit", "--optim adamw_8bit", "--optim adafactor"])
def test_what_needs_a_whole_model_goes_with_ddp_only(option):
    options = parse(option.split())
    check_shared(options, "ddp")
    for shared in ("fsdp2", "deepspeed"):
        with pytest.raises(JobError, match=f"{option} needs a whole model in each process, and this is {shared}"):
            check_shared(options, shared)
        check_shared(parse([]), shared)


def test_each_process_of_a_machine_has_a_cuda_device_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    options = parse(["--device", "cuda", "--fp16"])
    assert device(options, Place()) == "cuda"
    assert [device(options, Place(rank, 3, rank % 2)) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    with pytest.raises(JobError, match="there are 2 CUDA devices here, and more processes"):
        device(options, Place(2, 3, 2))
    with pytest.raises(JobError, match="--fp16 needs a CUDA device"):
        device(parse(["--device", "cpu", "--fp16"]), Place(0, 3))


def test_the_command_that_goes_on_starts_as_many_processes(launched, monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    launched(**torchrun)
    place = place_here()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as a job sets it
    assert again(["finetune", "--resume"], place).endswith(
        " -m torch.distributed.run --nproc-per-node 2 -m gralora_ext finetune --resume"
    )
    launched(**torchrun, ACCELERATE_MIXED_PRECISION="no")
    assert again(["finetune", "--resume"], place_here()) == "<your launcher> -m gralora_ext finetune --resume"
    launched(**{**torchrun, "WORLD_SIZE": "4"}, MASTER_ADDR="node0")
    assert again(["finetune", "--resume"], place_here()) == "<your launcher> -m gralora_ext finetune --resume"


def collate(rows):
    import torch

    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}


@pytest.mark.parametrize(("size", "batch_size"), [(1, 4), (2, 2), (4, 1)])
def test_each_step_takes_the_same_rows_whatever_the_number_of_processes(size, batch_size):
    loaders = [
        ShareLoader(list(range(39)), collate, Shares(list(range(39)), batch_size, 3, Place(r, size)))
        for r in range(size)
    ]
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        steps = [[batch for batch in loader] for loader in loaders]
        assert {len(batches) for batches in steps} == {len(loaders[0])} == {10}
        taken = [
            sorted(row for b in step if has_labels(b) for row in b["input_ids"].tolist())
            for step in zip(*steps, strict=True)
        ]
        alone = Shares(list(range(39)), 4, 3, Place())
        alone.set_epoch(epoch)
        assert taken == [sorted(rows) for rows in alone]
        assert sorted(row for rows in taken for row in rows) == list(range(39))


def state(count: int, batch_size: int = 2, engine: str = "ddp") -> dict:
    return {"processes": count, "engine": engine, "settings": {"batch_size": batch_size, "grad_accum": 2}}


def test_checkpoint_is_anyones_to_read_who_takes_as_many_rows():
    for now in (state(1, 4), state(2, 2), state(4, 1, "fsdp2")):
        _compare_processes(Path("checkpoint-1"), processes(state(2)), processes(now), "`again`")
    old = {"settings": {"batch_size": 8, "grad_accum": 1}}  # of before there were several
    _compare_processes(Path("checkpoint-1"), processes(old), processes(state(2)), "`again`")
    with pytest.raises(
        JobError, match=r"with 8 rows a step \(now 16: --batch-size x --grad-accum x 4 processes\); go on with"
    ):
        _compare_processes(Path("checkpoint-1"), processes(state(2)), processes(state(4)), "`again`")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["options", "rows"])
def test_every_process_stops_where_one_is_at_another_job(rank, what):
    """Before it loads a model: the first one would wait for that, and might give the others up."""
    states = [{"settings": {"r": 8}, "data_digest": "a"} for _ in range(2)]
    states[1].update({"settings": {"r": 4}} if what == "options" else {"data_digest": "b"})
    job = Job.__new__(Job)
    job.group, job.state, job.checkpoint, job.done, job.history = (
        Group(Place(rank, 2)),
        states[rank],
        None,
        0,
        History(),
    )
    job.group.exchange = lambda own: [(state, own[1]) for state in states]
    with pytest.raises(JobError, match=f"process 1 of 2 has other {what} than the first: start all with the same"):
        job.meet()


def test_deepspeeds_checkpoint_is_for_as_many_as_wrote_it():
    then = state(2, engine="deepspeed")
    _compare_processes(Path("checkpoint-1"), processes(then), processes(then), "`again`")
    for now in (state(4, 1, "deepspeed"), state(2)):
        with pytest.raises(JobError, match="2 processes with deepspeed"):
            _compare_processes(Path("checkpoint-1"), processes(then), processes(now), "`again`")


def test_accelerates_file_becomes_the_environment_of_processes(tmp_path):
    make_configurations(tmp_path)
    variables, size = read(tmp_path / "fsdp2.yaml", None)
    assert size == 2 and variables["ACCELERATE_USE_FSDP"] == "true" and variables["FSDP_VERSION"] == "2"
    assert variables["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    variables, size = read(tmp_path / "zero3.yaml", 4)
    assert size == 4 and variables["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no such file"),
        ("num_processes: [", "cannot be used"),
        (
            "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_machines: 2\nnum_processes: 4\n",
            "2 machines",
        ),
        ("compute_environment: LOCAL_MACHINE\ndistributed_type: PONY\n", "cannot be used"),
        ("compute_environment: LOCAL_MACHINE\nno_such_key: 1\n", "cannot be used"),
    ],
)
def test_file_that_is_not_accelerates_is_one_sentence(tmp_path, text, says):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(JobError, match=rf"--accelerate-config: .*a\.yaml.*{says}"):
        read(file, 2)


def test_checkpoint_that_lacks_a_process_s_random_numbers_is_not_whole(tmp_path):
    import json

    from gralora_ext.cli.checkpoints import NEEDED, STATE

    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    for name in (*NEEDED, "optimizer.pt", "rng_state_0.pth"):
        (checkpoint / name).write_text("x")
    (checkpoint / STATE).write_text(json.dumps({"processes": 2}))
    told: list[str] = []
    checkpoints = Checkpoints(tmp_path, told.append)
    checkpoints.seal(checkpoint)
    with pytest.raises(JobError, match="manifest.json does not list rng_state_1.pth"):
        checkpoints.newest_whole()
    (checkpoint / "rng_state_1.pth").write_text("x")
    (checkpoint / "manifest.json").unlink()
    checkpoints.seal(checkpoint)
    assert checkpoints.newest_whole() == checkpoint


# What the processes of a launch do: the first one's program, the second one's.
ENDS = {
    "one is told to stop and ends last": ("time.sleep(0.5); sys.exit(143)", f"sys.exit({LOST})", 143, ""),
    "one is killed": ("os.kill(os.getpid(), 9)", f"sys.exit({LOST})", 137, "process 0 of 2 was ended by SIGKILL: "),
    "one fails and the other works on": ("sys.exit(3)", "time.sleep(60)", 3, ""),
    "one does not answer": ("time.sleep(60)", f"sys.exit({LOST})", 1, "process 0 of 2 did not answer for 600 s: "),
    "none says why": ("sys.exit(0)", f"sys.exit({LOST})", 1, "process 1 of 2 has lost its connection to the others: "),
}


@pytest.mark.parametrize("case", ENDS)
def test_launcher_tells_the_cause_and_not_who_has_lost_it(case, launched, monkeypatch, capsys, tmp_path):
    launched()
    first, second, code, says = ENDS[case]
    options = parse(["--num-processes", "2", "--output", str(tmp_path / "output")])
    launch = _Launch(options, [], dict(os.environ), 2)
    program = f"import os, sys, time\nif os.environ['RANK'] == '0': {first}\nelse: {second}"
    launch.command = [sys.executable, "-c", program]
    assert launch.run() == code
    told = capsys.readouterr().err
    assert says in told if says else told == ""


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            ("--accelerate-config", "examples/fsdp2.yaml"),
            "--accelerate-config: another launcher has started the processes",
        ),
        (("--num-processes", "3"), "--num-processes 3: another launcher has started 2"),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_another_launchers_processes_are_told_what_they_cannot_take(launched, tmp_path, option, said, resumed, capsys):
    launched(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="a")
    options = parse([*option, "--output", str(tmp_path), *(["--resume"] if resumed else [])])
    job = Job(options, Group(place_here()))
    if resumed:
        job._leave_to_launcher()
        assert said in capsys.readouterr().out
        assert (options.accelerate_config, options.num_processes) == (None, None)
    else:
        with pytest.raises(JobError, match=said):
            job.check()


def test_the_number_of_processes_that_another_launcher_has_started_may_be_said(launched, tmp_path):
    launched(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="a")
    Job(parse(["--num-processes", "2", "--output", str(tmp_path)]), Group(place_here()))._leave_to_launcher()


def test_other_files_of_the_model_on_another_machine_are_told(monkeypatch):
    job = Job(parse([]), Group(Place(0, 2)))
    job.state = {"weights_digest": "a", "tokens_digest": "b"}
    monkeypatch.setattr(job.group, "exchange", lambda own: [own, own])
    job.compare_content()
    for name, what in (("weights_digest", "weights of the base"), ("tokens_digest", "tokens of the same rows")):
        monkeypatch.setattr(job.group, "exchange", lambda own, name=name: [own, {**own, name: "c"}])
        with pytest.raises(JobError, match=f"process 1 of 2 has other {what} than the first: the files of --model"):
            job.compare_content()


def test_a_reader_that_has_gone_is_no_process_that_was_lost(monkeypatch):
    group, error = Group(Place(0, 2)), BrokenPipeError(32, "Broken pipe")
    assert group.has_lost(error)
    monkeypatch.setattr("gralora_ext.cli.group.output_is_gone", lambda: True)
    assert not group.has_lost(error)
