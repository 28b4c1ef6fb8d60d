# SPDX-License-Identifier: Apache-2.0
"""The commands of the page on several processes, and the example of two."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import environment, finish, make_data, make_model, same_end
from error_messages import ROOT
from several_helpers import EXAMPLES, JOB, run_several, start_several

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def words_of(line: str) -> list[str]:
    """A command of a page as one of this Python's, with a job that is small."""
    words = shlex.split(line.replace("node0", "127.0.0.1"))
    for command, module in COMMANDS.items():
        if words[: len(command)] == list(command):
            words = ["-m", module, *words[len(command) :]]
    small = () if "--config" in words else (*map(str, JOB[5:]), "--steps", "3")
    return [*words, *("--rank" if word == "--r" else word for word in small)]  # torchrun takes --r for one of its own


PAGE = (ROOT / "docs" / "several_processes.md").read_text(encoding="utf-8")
LINES = re.findall(r"^```bash\n(.+)\n```$", PAGE, re.MULTILINE)
COMMANDS = {
    ("gralora-ext",): "gralora_ext",
    ("torchrun",): "torch.distributed.run",
    ("accelerate", "launch"): "accelerate.commands.launch",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the page speaks of it, with the model and the data."""
    folder = tmp_path_factory.mktemp("page")
    make_model(folder / "path" / "to" / "model")
    make_data(folder / "train.jsonl")
    shutil.copytree(EXAMPLES, folder / "examples")
    return folder


def outcome(page: Path, number: int) -> Path:
    """The output of a command of the page, which is run once."""
    output, kept = page / "out", page / f"out{number}"
    if kept.exists():
        return kept
    words = words_of(LINES[number])
    if "--resume" in words:
        shutil.copytree(outcome(page, 0), output)
    others = []
    if "--nnodes" in words:  # the other machine
        other = [*words]
        other[words.index("--node-rank") + 1] = "1"
        others.append(start_several(cwd=page, launcher=tuple(other)))
    result = run_several(cwd=page, launcher=tuple(words))
    for process in others:
        assert finish(process).returncode == 0
    assert "Traceback" not in result.stderr
    return output.rename(kept)


def mark_of(line: str) -> pytest.MarkDecorator:
    """Of the launchers that are not ours, torchrun on two machines: more than on one."""
    return pytest.mark.long if "--nnodes" in line else pytest.mark.exhaustive


@pytest.mark.parametrize("number", [pytest.param(n, id=f"line{n}", marks=mark_of(x)) for n, x in enumerate(LINES)])
def test_each_command_of_the_page_runs(page, number):
    """By whichever launcher the processes were started, they do the same to the last bit."""
    line = LINES[number]
    if "zero3" in line and not HAS_DEEPSPEED:
        pytest.skip("needs deepspeed")
    shared = [n for n, other in enumerate(LINES) if "fsdp2" in other]
    like = number if "zero3" in line else shared[0] if number in shared else 0
    same_end(outcome(page, number), outcome(page, like))


@pytest.mark.exhaustive
def test_the_example_of_two_processes_runs(page):
    words = ("--model", "path/to/model", "--data", "train.jsonl", "--output", "example", "--steps", 2)
    command = ["examples/two_processes.sh", *map(str, (*words, *JOB[5:]))]
    result = subprocess.run(
        command, cwd=page, env=environment(PYTHON=sys.executable), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "(2 processes, fsdp2)" in result.stdout, result.stderr
