# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext merge``: what it prints, and one sentence with exit code 2 where something is wrong."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoint_helpers import assert_same_weights, gpt2, gralora, llama, merged_in_memory, save_adapter, save_base
from cli_helpers import call, sentence
from error_messages import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gralora_ext.checkpoint import merge
from gralora_ext.cli.merge import parse
from gralora_ext.program.errors import JobError

PAGE = (ROOT / "docs" / "merge_files.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("merge")
    base = save_base(place / "base", llama(), torch.bfloat16)
    for name, seed in (("adapter", 1), ("first", 2), ("second", 3)):
        save_adapter(place / name, base, gralora(), seed=seed)
    return place


def test_the_command_of_the_page_writes_the_merged_model(folder):
    (block,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    program, *arguments = shlex.split(block)
    assert program == "gralora-ext"
    done = call(*arguments, cwd=folder)
    assert done.returncode == 0 and not done.stderr
    assert "merged: 14 weights merged; 1 files of weights written" in done.stdout
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert_same_weights(merged, merged_in_memory(folder / "base", folder / "adapter"))
    again = call(*arguments, cwd=folder)
    assert again.returncode == 0 and "merged has this merge already: nothing to do" in again.stdout


def test_it_tells_which_files_it_has_kept(folder):
    merge(folder / "base", folder / "adapter", folder / "changed")
    (folder / "changed" / "tokenizer.json").write_text("mine")
    done = call("merge", "base", "adapter", "changed", "--overwrite", cwd=folder)
    assert done.returncode == 0 and not done.stderr
    assert "kept, since no merge wrote it, or it was changed since: changed/tokenizer.json.kept\n" in done.stdout


def test_options_of_the_page_are_taken(folder):
    options = re.findall(r"^\| `(--[^`]+)` \|", PAGE, re.MULTILINE)
    assert len(options) == 5
    words = [word for option in options for word in shlex.split(option)]
    plan = call("merge", "base", "first", "second", "of-the-page", *words, cwd=folder)
    assert plan.returncode == 0 and not plan.stderr
    assert plan.stdout.startswith("of-the-page: 1 files of weights with 21 tensors\n14 weights would be merged\n")
    assert not (folder / "of-the-page").exists()
    words.remove("--dry-run")
    assert call("merge", "base", "first", "second", "of-the-page", *words, cwd=folder).returncode == 0
    request = json.loads((folder / "of-the-page" / "merge.json").read_text())["request"]
    assert request["scale"] == 0.5 and request["dtype"] == "bfloat16" and request["max_shard_size"] == 5_000_000_000


def test_names_are_found_in_a_process_of_their_own(tmp_path):
    base = save_base(tmp_path / "base", gpt2())
    save_adapter(tmp_path / "adapter", base, gralora(target_modules=["c_attn"], fan_in_fan_out=True))
    expected = merged_in_memory(base, tmp_path / "adapter")
    path = base / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    done = call("merge", "base", "adapter", "out", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected)


WRONG = {
    ("base", "adapter"): "expected BASE, at least one ADAPTER, and OUT, got 2 folders",
    ("nothing", "adapter", "out"): "BASE: nothing is not a folder",
    ("base", "nothing", "out"): "ADAPTER: nothing is not a folder",
    ("base", "adapter", "out", "--dtpye", "bf16"): "did you mean --dtype?",
    ("base", "adapter", "out", "--dtype", "int8"): "--dtype: expected bf16, fp16 or fp32, got 'int8'",
    ("base", "adapter", "out", "--scale", "nan"): "--scale: expected a finite number, got 'nan'",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_option_is_told_before_torch_is_imported(folder, words, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(JobError, match=re.escape(WRONG[words])):
        parse(list(words))


@pytest.mark.parametrize("scale", ["-1e-3", "-.5", "-1", "2E3"])
def test_options_may_stand_between_the_folders_and_a_scale_may_be_negative(folder, scale, monkeypatch):
    monkeypatch.chdir(folder)
    options = parse(["base", "--dtype", "bf16", "first", "--scale", scale, "second", "--overwrite", "out"])
    assert options.folders == ["base", "first", "second", "out"]
    assert (options.dtype, options.scale, options.overwrite) == ("bf16", float(scale), True)


def test_torch_is_not_imported_for_the_options():
    program = "import sys; sys.argv[0] = 'gralora-ext'; import gralora_ext.cli.merge; assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd="/")


@pytest.mark.parametrize(
    "words, message",
    [
        (("adapter", "adapter", "out"), "config.json cannot be read: No such file"),
        (("base", "base", "out"), "adapter_config.json cannot be read: No such file"),
        (("base", "adapter", "first"), "holds other files (README.md)"),
        (("base", "adapter", "out", "--max-shard-size", "5 apples"), "max_shard_size: expected"),
    ],
)
def test_what_is_wrong_with_files_is_one_sentence(folder, words, message):
    done = call("merge", *words, cwd=folder)
    assert done.returncode == 2 and message in sentence(done), done.stderr


def test_a_signal_ends_it_in_good_order_and_the_same_command_goes_on(tmp_path):
    base = save_base(
        tmp_path / "base", llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3), max_shard_size="20MB"
    )
    save_adapter(tmp_path / "adapter", base, gralora())
    command = [sys.executable, "-m", "gralora_ext", "merge", "base", "adapter", "out"]
    job = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stage = tmp_path / "out" / ".gralora_ext-merge"
    while len(list(stage.glob("model-*.safetensors"))) < 2 and job.poll() is None:  # so that the first one is listed
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    _, told = job.communicate()
    assert (
        job.returncode == 143
        and told == "stopped by SIGTERM; the same command goes on from the files that are finished\n"
    )
    assert not (tmp_path / "out" / "config.json").exists() and not list(stage.glob("*.part"))
    done = call("merge", "base", "adapter", "out", cwd=tmp_path)
    assert done.returncode == 0 and "were finished before" in done.stdout
