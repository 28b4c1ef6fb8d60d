# SPDX-License-Identifier: Apache-2.0
"""A job whose numbers are finite no more ends with its results written, a sentence and an exit code of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import call, make_data, make_model, metrics, sentence
from safetensors.torch import load_file, save_file

JOB = ("finetune", "--model", "model", "--data", "data.jsonl", "--steps", 8, "--eval-every", 4, "--save-every", 2)
JOB += ("--max-length", 64, "--sample-tokens", 4)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diverged")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    return folder


def with_weight(work: Path, name: str, key: str, value: float) -> str:
    """A copy of the model in which all elements of one weight are ``value``."""
    file = shutil.copytree(work / "model", work / name) / "model.safetensors"
    tensors = load_file(file)
    tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def diverges(work: Path, output: str, *more: object) -> tuple[str, dict[str, Any]]:
    """What the job says on stderr, and its metrics."""
    result = call(*JOB, "--output", output, *more, cwd=work)
    assert result.returncode == 3, result.stderr
    values = metrics(work / output)
    assert values["eval_loss_after"] is values["eval_loss_fall"] is values["merged_logits"] is None
    assert (work / output / "adapter" / "adapter_model.safetensors").is_file()
    assert (work / output / "loss.png").stat().st_size > 1000
    assert not (work / output / "merged").exists()
    assert values["diverged"] in sentence(result)
    assert sentence(result).startswith("gralora-ext: the job has diverged: ")
    return sentence(result), values


def test_loss_that_is_no_number_ends_the_job_with_its_results(work):
    line, values = diverges(work, "rate", "--lr", 1e30)
    assert "loss is nan " in line or "loss is inf " in line or "are zero" in line
    assert "try a lower --lr than 1e+30" in line
    assert 1 <= len(values["losses"]) <= 4 and values["losses"][0]["loss"] > 0


def test_earlier_merged_model_of_a_job_that_now_diverges_goes(work):
    assert call(*JOB, "--output", "again", cwd=work).returncode == 0
    assert (work / "again" / "merged").is_dir()
    diverges(work, "again", "--lr", 1e30)


def test_logits_that_are_all_zero_end_the_job_with_its_results(work):
    line, values = diverges(work, "zero", "--model", with_weight(work, "headless", "lm_head.weight", 0.0))
    assert "all logits of the held-out rows are zero after 4 steps" in line
    assert len(values["losses"]) == 4


def test_model_without_finite_logits_ends_before_its_first_step(work):
    line, values = diverges(work, "over", "--model", with_weight(work, "loud", "lm_head.weight", 3e38))
    assert "the held-out loss is nan after 0 steps" in line
    assert "the model is not fit for training as it is" in line
    assert values["losses"] == [] and values["tokens_per_second"] is None and values["eval_loss_before"] is None
