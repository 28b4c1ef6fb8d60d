# SPDX-License-Identifier: Apache-2.0
"""What a user can do wrong: one sentence on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_helpers import call, environment, make_data, make_model, sentence
from safetensors.torch import load_file, save_file


def damage(folder: Path, file: str, change: Callable[[str], str]) -> None:
    """Copies the model into ``folder`` with one of its text files changed."""
    shutil.copytree(folder.parent / "model", folder)
    text = (folder / file).read_text(encoding="utf-8") if (folder / file).exists() else ""
    (folder / file).write_text(change(text), encoding="utf-8")


def without_vocabulary(text: str) -> str:
    values = json.loads(text)
    values["model"]["vocab"] = {"<pad>": 0, "<eos>": 1}
    return json.dumps(values)


def of_a_larger_model(text: str) -> str:
    values = json.loads(text)
    values["model"]["vocab"] = {token: i + 5000 * (i > 20) for token, i in values["model"]["vocab"].items()}
    return json.dumps(values)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    broken = shutil.copytree(folder / "model", folder / "broken") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    for name, value in (("nan", float("nan")), ("inf", float("-inf"))):
        weights = shutil.copytree(folder / "model", folder / name) / "model.safetensors"
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, weights, metadata={"format": "pt"})
    damage(folder / "config-cut", "config.json", lambda text: text[:100])
    damage(
        folder / "config-digits", "config.json", lambda text: text.replace('"eos_token_id": 1', f'"x": {"1" * 5000}')
    )
    damage(folder / "config-deep", "config.json", lambda text: "[" * 100_000)
    damage(folder / "tokenizer-cut", "tokenizer.json", lambda text: text[:900])
    damage(folder / "tokenizer-empty", "tokenizer.json", lambda text: "{}")
    damage(folder / "tokenizer-silent", "tokenizer.json", without_vocabulary)
    damage(folder / "tokenizer-other", "tokenizer.json", of_a_larger_model)
    damage(folder / "generation", "generation_config.json", lambda text: text.replace(": 1,", ": [1, 1e308],"))
    for name, template in (
        ("syntax", "{% for %}"),
        ("raises", "{{ raise_exception('no such role') }}"),
        ("calls", "{{ x() }}"),
    ):
        damage(folder / f"template-{name}", "chat_template.jinja", lambda text, template=template: template)
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("x")
    (folder / "digits.jsonl").write_text('{"question": "q", "answer": "a", "n": %s}\n' % ("9" * 5000))
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
        (("--model", "broken"), "--model broken cannot be loaded: its weights: "),
        (("--model", "nan"), "--model nan: its weight model.layers.1.mlp.up_proj.weight holds NaN or infinity"),
        (("--model", "inf", "--dtype", "bf16"), "its weight model.layers.1.mlp.up_proj.weight holds NaN or infinity"),
        (("--model", "config-cut"), "--model config-cut cannot be loaded: its config.json: "),
        (("--model", "config-digits"), "--model config-digits cannot be loaded: its config.json: "),
        (("--model", "config-deep"), "--model config-deep cannot be loaded: its config.json: "),
        (("--model", "tokenizer-cut"), "--model tokenizer-cut cannot be loaded: its tokenizer: "),
        (("--model", "tokenizer-empty"), "is damaged or missing, get or convert it again"),
        (("--model", "tokenizer-silent"), "tokenizer-silent makes no token of any row: its files are damaged"),
        (("--model", "tokenizer-other"), "its tokenizer makes the token 5"),
        (("--model", "generation"), "eos_token_id in its generation_config.json is 1e+308, which is no token"),
        (("--model", "template-syntax"), "template-syntax fails: "),
        (("--model", "template-raises"), "template-raises fails: no such role: mend it, or remove it"),
        (("--model", "template-calls"), "template-calls fails: 'x' is undefined"),
        (("--data", "nowhere.jsonl"), "--data: there is no file nowhere.jsonl"),
        (("--data", "digits.jsonl"), "digits.jsonl:1: not a JSON object: Exceeds the limit (4300 digits)"),
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


def test_model_that_the_hub_does_not_give_is_one_sentence(work, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = fails(work, *JOB, "--model", "nowhere/model")
    assert "--model nowhere/model cannot be loaded: it is neither a folder nor a file here" in line


def test_unknown_command_is_one_sentence(work):
    assert "unknown command 'tune' (did you mean finetune?)" in fails(work, "tune")
    commands = "finetune, merge, export-lora, import-official, compare, analyze, info"
    assert f"unknown command 'xyzzy'; the commands are {commands}" in fails(work, "xyzzy")


def test_line_breaks_and_control_characters_in_names_keep_the_sentence_on_one_line(work):
    assert r"there is no folder or file ./a\nb\x1b[31m" in fails(work, *JOB, "--model", "./a\nb\x1b[31m")


def test_too_many_epochs_are_one_sentence(work):
    arguments = [word for word in JOB if word not in ("--steps", "2")]
    assert "--epochs 1e+300 is more than 2147483647 steps" in fails(work, *arguments, "--epochs", "1e300")


WITHOUT_TORCH = """
import os, sys
sys.argv[0] = "gralora-ext"  # as the console script begins
from gralora_ext.cli import main
code = main(sys.argv[1:])
print(code, "torch" in sys.modules, "transformers" in sys.modules)
"""


@pytest.mark.parametrize(
    "mistake",
    [
        ("--lrr", "1"),
        ("--seed", "-1"),
        ("--target-modules", "(q_proj"),
        ("--config", "nowhere.yaml"),
        ("--model", "nowhere.gguf"),
        ("--model", "empty"),
        ("--data", "nowhere.jsonl"),
        ("--data", "digits.jsonl"),
        ("--held-out", "48"),
        ("--output", "model"),
        ("--output", "text.txt/out"),
        ("--output", "old", "--resume"),
    ],
)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_mistake_is_answered_before_torch_is_imported(work, mistake, processes):
    """By the first of several processes too."""
    place = {"WORLD_SIZE": str(processes), "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    (work / "old" / "checkpoints" / "checkpoint-9").mkdir(parents=True, exist_ok=True)
    (work / "old" / "finetune.json").write_text("{}")
    command = [sys.executable, "-c", WITHOUT_TORCH, *JOB, *mistake]
    result = subprocess.run(command, cwd=work, env=environment(**place), capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "2 False False", result.stdout
    assert sentence(result).startswith("gralora-ext: error: ")


@contextlib.contextmanager
def limited(what: int, size: int) -> Iterator[None]:
    """Within it this process has no more of a resource."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_little_memory_is_one_sentence(work):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, used + (1 << 31)):
        result = call(*JOB, "--r", "2000000000", cwd=work)
    assert result.returncode == 2
    assert re.search(r"error: out of memory: [\d,]+ MiB more were asked for at once: try a smaller", sentence(result))


def test_little_memory_names_no_option_that_a_command_lacks(work, monkeypatch):
    def run_out(arguments):
        raise MemoryError

    monkeypatch.setattr("gralora_ext.cli.info.run", run_out)
    result = call("info", cwd=work)
    assert result.returncode == 2 and sentence(result) == "gralora-ext: error: out of memory: free some"


def test_debug_shows_where_an_error_comes_from(work):
    result = call(*JOB, "--max-length", "4", "--debug", cwd=work)
    assert result.returncode == 2 and "Traceback" in result.stderr


# Files over these sizes cannot be written. One checkpoint's optimizer state has about 130 kB, the
# merged model 110 kB.
@pytest.mark.parametrize(("output", "limit", "more"), [("full1", 60_000, ()), ("full2", 100_000, ("--r", 2))])
def test_full_disk_leaves_no_half_of_anything(work, output, limit, more):
    with limited(resource.RLIMIT_FSIZE, limit):
        result = call(*JOB, *more, "--output", output, cwd=work)
    assert result.returncode == 2, result.stderr
    assert "cannot be written: File too large (" in sentence(result) and "MiB are free" in sentence(result)
    left = {str(p.relative_to(work / output)) for p in (work / output).rglob("*")}
    checkpoint = {p for p in left if p.startswith("checkpoints/")}
    assert left - checkpoint == {"finetune.json", ".lock", ".written.json", "checkpoints"}
    assert bool(checkpoint) == (output == "full2")
