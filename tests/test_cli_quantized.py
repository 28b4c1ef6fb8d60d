# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext finetune --load-in-4bit`` and ``--load-in-8bit``."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cli_helpers import call, make_data, make_model, metrics, sentence
from safetensors.torch import load_file, save_file

from gralora_ext.cli.options import parse, settings
from gralora_ext.program.errors import JobError

JOB = ("--steps", 12, "--lr", 0.02, "--r", 4, "--max-length", 64, "--sample-tokens", 4, "--eval-every", 3)
JOB += ("--held-out-from", "end")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    return folder


def arguments(output: str, *more: object, model: str = "model") -> tuple[object, ...]:
    return ("finetune", "--model", model, "--data", "data.jsonl", "--output", output, *JOB, *more)


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(output)["eval_losses"]]


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_trained_and_merged_in_its_own_dtype(work, bits):
    output = work / f"of-{bits}"
    done = call(*arguments(output.name, f"--load-in-{bits}bit"), cwd=work)
    assert done.returncode == 0, done.stderr
    assert f"quantized to {bits} bits" in done.stdout and "not quantized, to merge" in done.stdout
    found = losses(output)
    assert len(found) == 5 and found[-1] < 0.8 * found[0]
    config = json.loads((output / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    base, merged = (load_file(folder / "model.safetensors") for folder in (work / "model", output / "merged"))
    assert {t.dtype for t in merged.values()} == {torch.float32} and base.keys() == merged.keys()
    adapter = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]).name == "model"


@needs_bitsandbytes
def test_evaluations_do_not_change_the_training_of_any_backend(work):
    """On some processors bitsandbytes repacks 4-bit weights when they are evaluated, and their product loses its derivative."""
    for backend in ("fused", "lora"):
        ends = []
        for every in (1, 4):
            output = f"{backend}-{every}"
            job = arguments(
                output, "--load-in-4bit", "--backend", backend, "--no-merge", "--steps", 4, "--eval-every", every
            )
            assert call(*job, cwd=work).returncode == 0
            ends.append([entry["loss"] for entry in metrics(work / output)["losses"]])
        assert ends[0] == ends[1] and len(ends[0]) == 4


@needs_bitsandbytes
def test_a_resumed_job_takes_the_same_bits(work):
    assert call(*arguments("resumed", "--load-in-4bit", "--no-merge", "--steps", 1), cwd=work).returncode == 0
    done = call(*arguments("resumed", "--resume", "--no-merge"), cwd=work)
    assert done.returncode == 2 and "--load-in-4bit True (now None)" in sentence(done)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_is_no_number_is_seen_in_its_statistics(work, bits):
    broken = work / f"broken-{bits}"
    make_model(broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = call(*arguments("none", f"--load-in-{bits}bit", model=broken.name), cwd=work)
    assert done.returncode == 2
    assert "model.layers.0.mlp.up_proj" in sentence(done) and "holds NaN or infinity" in sentence(done)


def test_one_kind_of_quantization_at_a_time():
    with pytest.raises(JobError, match="--load-in-4bit and --load-in-8bit exclude each other"):
        parse(["--load-in-4bit", "--load-in-8bit"])
    assert settings(parse(["--load-in-4bit"]))["load_in_4bit"] is True
    assert not {"load_in_4bit", "load_in_8bit"} & settings(parse([])).keys()


def test_a_missing_package_is_named_before_anything_is_loaded(work, monkeypatch):
    from gralora_ext.cli import checks

    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match="--load-in-8bit needs bitsandbytes: `pip install bitsandbytes`"):
        checks.check_needed(parse(["--load-in-8bit"]))
    checks.check_needed(parse([]))


@needs_bitsandbytes
def test_a_base_that_is_quantized_in_its_files_is_not_merged_into(work):
    """It is told before the training, and not after it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    small = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(work / "model", quantization_config=small).save_pretrained(work / "small")
    for file in (work / "model").glob("tokenizer*"):
        (work / "small" / file.name).write_bytes(file.read_bytes())
    for backend in ("fused", "lora"):
        done = call(*arguments("none", "--backend", backend, model="small"), cwd=work)
        assert done.returncode == 2 and not (work / "none").exists()
        assert "--model: its weights are quantized in their files (bitsandbytes)" in sentence(done)
    done = call(*arguments("none", "--load-in-4bit", model="small"), cwd=work)
    assert done.returncode == 2
    assert "--load-in-4bit: small is quantized already: leave that option out" in sentence(done)
    done = call(*arguments("small-out", "--no-merge", model="small"), cwd=work)
    assert done.returncode == 0, done.stderr
    assert losses(work / "small-out")[-1] < losses(work / "small-out")[0]
