# SPDX-License-Identifier: Apache-2.0
"""The documentation of the job: every command in it runs, on a tiny model, and its table of options is the program's."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from importlib.util import find_spec

import pytest
from cli_helpers import CHAT, call, make_chat_data, make_chat_model, make_data, make_model, metrics
from error_messages import ROOT

PAGES = ("docs/data.md", "docs/memory.md", "docs/finetune.md")
pytestmark = pytest.mark.usefixtures("no_plot")
SHORT = ("--steps", 1, "--max-length", 120, "--sample-tokens", 2, "--eval-rows", 2)


def commands(page):
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert all(line.startswith("gralora-ext finetune ") for line in lines)
    return [line.removeprefix("gralora-ext ") for line in lines]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    make_model(folder / "model")
    make_chat_model(folder / "chat-model")
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "model").symlink_to(folder / "model")
    make_data(folder / "train.jsonl", 20)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    shutil.copy(folder / "train.jsonl", folder / "part1.jsonl")
    make_data(folder / "held-out.jsonl", 10)
    (folder / "train.csv").write_text("ask,reply\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    if find_spec("pyarrow"):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "part2.parquet")
    make_chat_data(folder / "chat.jsonl")
    (folder / "template.jinja").write_text(CHAT)
    return folder


@pytest.mark.parametrize("command", [pytest.param(c, id=f"{p}: {c[:70]}") for p in PAGES for c in commands(p)])
def test_command_runs_as_it_stands(work, command):
    if "bit" in command and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    if "parquet" in command and find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    done = call(*shlex.split(command), *SHORT, cwd=work)
    assert done.returncode == 0, done.stderr


def test_the_table_of_options_is_the_programs():
    module = runpy.run_path(str(ROOT / "scripts" / "option_table.py"))
    written = module["PAGE"].read_text(encoding="utf-8")
    assert module["page"]() == written, "run python scripts/option_table.py"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_the_example_of_a_chat_in_4_bits_trains_with_its_one_command(tmp_path):
    make_chat_model(tmp_path / "model")
    lines = (ROOT / "examples" / "chat_4bit.sh").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    (command,) = (line for line in lines if line.startswith("gralora-ext "))
    words = [word.replace("$here", str(ROOT / "examples")) for word in shlex.split(command) if word != "$@"]
    done = call(*words[1:], "--model", "model", *SHORT, "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "conversations to train on" in done.stdout and "packing: " in done.stdout and "to 4 bits" in done.stdout
    assert metrics(tmp_path / "out")["merged_logits"]["relative"] < 1e-5
