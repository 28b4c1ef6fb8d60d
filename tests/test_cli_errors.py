"""What a user can do wrong: one sentence on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import call, make_data, make_model, run, sentence


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    broken = shutil.copytree(folder / "model", folder / "broken") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("x")
    return folder


def fails(work: Path, *arguments: object) -> str:
    """Runs the program in this process, in ``work``; returns the one line on stderr."""
    before = sorted(work.rglob("*"))
    result = call(*arguments, cwd=work)
    assert result.returncode == 2, result.stderr
    assert sorted(work.rglob("*")) == before, "something was left behind"
    return sentence(result)


JOB = ("finetune", "--model", "model", "--data", "data.jsonl", "--output", "out", "--steps", "2", "--max-length", "64")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "./nowhere"), "--model: there is no folder or file ./nowhere"),
        (("--model", "nowhere.gguf"), "--model: there is no folder or file nowhere.gguf"),
        (("--model", "empty"), "the folder empty holds no config.json"),
        (("--model", "text.txt"), "text.txt is a file, but not a .gguf one"),
        (("--model", "broken"), "--model broken cannot be loaded: "),
        (("--data", "nowhere.jsonl"), "--data: there is no file nowhere.jsonl"),
        (("--data", "text.txt"), "text.txt:1: not a JSON object"),
        (("--answer-field", "reply"), "data.jsonl:1: the field 'reply' (--answer-field) is missing"),
        (("--held-out", "48"), "48 rows, and 48 of them are held out"),
        (("--k", "3", "--r", "6"), "--k 3 does not divide the width 32 of model.layers.0.self_attn.q_proj"),
        (("--k", "3"), "--k 3 does not divide --r 16"),
        (
            ("--target-modules", "q_proj", "wq"),
            "--target-modules: 'wq' matches no linear layer of the model; it has down_proj",
        ),
        (("--target-modules", "(q_proj"), "'(q_proj' is not a regular expression"),
        (("--max-length", "256"), "--max-length 256 is more than the 128 positions"),
        (("--max-length", "4"), "--max-length 4 leaves no room for an answer in any of the 39 training rows"),
        (("--output", "text.txt"), "--output: text.txt is not a folder"),
        (("--output", "model"), "--output: model holds other files"),
        (("--output", "text.txt/out"), "--output: text.txt/out cannot be written, since "),
        (("--dtype", "int4"), "argument --dtype: invalid choice: 'int4'"),
        pytest.param(
            ("--device", "cuda"),
            "--device cuda: torch sees no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here"),
        ),
        (("--config", "nowhere.yaml"), "nowhere.yaml cannot be read"),
    ],
)
def test_mistake_is_one_sentence(work, arguments, says):
    line = fails(work, *JOB, *arguments)
    assert says in line and line.startswith("gralora-ext: error: ")


def test_model_that_the_hub_does_not_give_is_one_sentence(work):
    result = run(*JOB, "--model", "nowhere/model", cwd=work, code=2)
    assert "--model nowhere/model cannot be loaded: it is neither a folder nor a file here" in sentence(result)


def test_unknown_command_is_one_sentence(work):
    assert "unknown command 'tune'" in fails(work, "tune")


def test_debug_shows_where_an_error_comes_from(work):
    result = call(*JOB, "--max-length", "4", "--debug", cwd=work)
    assert result.returncode == 2 and "Traceback" in result.stderr


# Files over these sizes cannot be written. One checkpoint's optimizer state has about 130 kB, the merged model 110 kB.
@pytest.mark.parametrize(("output", "limit", "more"), [("full1", 60_000, ()), ("full2", 100_000, ("--r", 2))])
def test_full_disk_leaves_no_half_of_anything(work, output, limit, more):
    result = run(
        *JOB,
        *more,
        "--output",
        output,
        cwd=work,
        code=2,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "cannot be written: " in sentence(result) and "MiB are free" in sentence(result)
    left = {str(p.relative_to(work / output)) for p in (work / output).rglob("*")}
    checkpoint = {p for p in left if p.startswith("checkpoints/")}
    assert left - checkpoint == {"finetune.json", ".lock", ".written.json", "checkpoints"}
    assert bool(checkpoint) == (output == "full2")
