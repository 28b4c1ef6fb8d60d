# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of the paper's own repository computes, once imported, what the paper's formula gives."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint_helpers import gralora, llama, save_adapter, save_base
from cli_helpers import call, sentence
from official_helpers import TARGETS, make
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import gralora_ext
from gralora_ext.checkpoint.official import import_official
from gralora_ext.program.errors import FileError

TOKENS = torch.arange(24).view(2, 12) * 7 % 96
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), llama())


def papers_layer(x: Tensor, config: dict[str, Any], tensors: dict[str, Tensor], key: str) -> Tensor:
    """The paper's formula, block by block: output j is the sum over inputs n of x_n A_{n,j} B_{n,j}, scaled by alpha / r.

    A_{n,j} is the j-th share of the ranks of A_n, and B_{n,j} the n-th of those of B_j; beside it the hybrid LoRA.
    """
    A, B, k = tensors[f"{key}.gralora_A"], tensors[f"{key}.gralora_B"], config["gralora_k"]
    inputs, share = x.chunk(k, dim=-1), A.shape[2] // k
    outputs = []
    for j in range(k):
        terms = [
            inputs[n] @ A[n][:, j * share : (j + 1) * share] @ B[j][n * share : (n + 1) * share, :] for n in range(k)
        ]
        outputs.append(sum(terms))
    y = torch.cat(outputs, dim=-1)
    if config["hybrid_r"]:
        y = y + x @ tensors[f"{key}.gralora_A_general.weight"].T @ tensors[f"{key}.gralora_B_general.weight"].T
    return config["gralora_alpha"] / config["r"] * y


def papers_logits(base: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    for name, module in model.named_modules():
        key = f"base_model.model.{name}"
        if f"{key}.gralora_A" in tensors:
            module.register_forward_hook(
                lambda _, inputs, y, key=key: y + papers_layer(inputs[0], config, tensors, key)
            )
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("tuner", ["stock", "fused"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"r": 16, "hybrid_r": 8}, {"r": 11, "hybrid_r": 3, "gralora_k": 4}, {"gralora_k": 1, "gralora_alpha": 7}],
)
def test_the_imported_adapter_computes_the_papers_formula(
    base: Path, tmp_path: Path, fields: dict[str, int], tuner: str
) -> None:
    folder, config, tensors = make(tmp_path / "official", base, **fields)
    report = import_official(folder, tmp_path / "out")
    expected = papers_logits(base, config, tensors)
    with gralora_ext.enable() if tuner == "fused" else nullcontext():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits
    assert (expected - plain).abs().max() > 0.1, "the adapter changes nothing"
    h = config["hybrid_r"]
    assert (
        report.layers == len(TARGETS) * 2 and (report.r, report.hybrid_r) == (config["r"] - h, h) and not report.notes
    )


def test_peft_alone_scales_such_a_checkpoint_wrongly(base: Path, tmp_path: Path) -> None:
    """Why there is an import at all: if this fails, PEFT has learned the other words."""
    folder, config, tensors = make(tmp_path / "official", base)
    with pytest.warns(UserWarning, match="gralora_alpha"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    assert (model(TOKENS).logits - papers_logits(base, config, tensors)).abs().max() > 0.1


def test_tensors_and_settings_are_carried_over(base: Path, tmp_path: Path) -> None:
    fields = {
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "modules_to_save": ["lm_head"],
        "hybrid_r": 2,
        "r": 10,
    }
    folder, config, tensors = make(tmp_path / "official", base, **fields)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    tensors["base_model.model.lm_head.weight"] = torch.randn(96, 32)
    save_file(tensors, folder / WEIGHTS)
    import_official(folder, tmp_path / "out")
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert written.keys() == tensors.keys()
    assert all(
        torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    new = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (new["r"], new["hybrid_r"], new["alpha"], new["gralora_k"]) == (8, 2, 20, 2) and "gralora_alpha" not in new
    for name in (
        "gralora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "base_model_name_or_path",
    ):
        assert new[name] == config[name]
    assert new["task_type"] == "CAUSAL_LM" and set(new["target_modules"]) == set(TARGETS)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert torch.equal(model.base_model.model.lm_head.weight, tensors["base_model.model.lm_head.weight"])


def test_biases_that_the_repository_did_not_save_are_told(base: Path, tmp_path: Path) -> None:
    folder, *_ = make(tmp_path / "official", base, bias="gralora_only")
    (note,) = import_official(folder, tmp_path / "out").notes
    assert "changed biases (bias is 'gralora_only'), which that repository does not save" in note
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["bias"] == "none"


WRONG = {
    "PEFT's own": (
        {"gralora_alpha": None},
        "expected peft_type 'GRALORA' and gralora_alpha, got 'GRALORA' and no gralora_alpha",
    ),
    "LoRA": ({"peft_type": "LORA"}, "expected peft_type 'GRALORA' and gralora_alpha, got 'LORA' and gralora_alpha"),
    "alpha a text": ({"gralora_alpha": "8"}, "alpha: expected a number"),
    "r a text": ({"r": "8"}, "expected whole r > hybrid_r >= 0"),
    "a hybrid rank beyond r": ({"hybrid_r": 8}, "expected whole r > hybrid_r >= 0"),
    "r not divisible": ({"gralora_k": 3}, "divisible by gralora_k, got r 8, hybrid_r 0 and gralora_k 3"),
    "other ranks than the tensors": ({"r": 10}, "whose last size is 10, got .*gralora_A with shape"),
    "another k than the tensors": ({"gralora_k": 4}, "gralora_k is 4, but layer"),
    "a field of its own": (
        {"use_rslora": True},
        "has 'use_rslora', which a checkpoint of SqueezeBits/GraLoRA does not have",
    ),
    "a bias of another kind": ({"bias": "lora_only"}, "bias: expected one of none, all, gralora_only, got 'lora_only'"),
    "a task that there is not": ({"task_type": "COOKING"}, "has what PEFT's configuration refuses: Invalid task type"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_such_checkpoint_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    fields, message = WRONG[name]
    folder, config, _ = make(tmp_path / "official", base)
    config = {key: value for key, value in {**config, **fields}.items() if key != "gralora_alpha" or value is not None}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(FileError, match=message):
        import_official(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_peft_needs_no_import(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, gralora())
    with pytest.raises(FileError, match="got 'GRALORA' and no gralora_alpha"):
        import_official(tmp_path / "a", tmp_path / "out")


def test_a_pickle_is_refused_with_the_way_out(base: Path, tmp_path: Path) -> None:
    folder, *_ = make(tmp_path / "official", base)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileError, match="pickles can run code"):
        import_official(folder, tmp_path / "out")


# ---------------------------------------------------------------- loading it without an import


def test_under_enable_loading_one_names_the_command(base: Path, tmp_path: Path) -> None:
    folder, *_ = make(tmp_path / "official", base)
    with gralora_ext.enable():
        for load in (
            lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
            lambda: PeftConfig.from_pretrained(folder),
            lambda: gralora_ext.GraloraConfig(gralora_alpha=8),
        ):
            with pytest.raises(ValueError, match="`gralora-ext import-official ADAPTER OUT`"):
                load()


def test_pefts_own_class_is_as_it_was() -> None:
    with gralora_ext.enable(), pytest.raises(TypeError, match="gralora_alpha"):
        peft.GraloraConfig(gralora_alpha=8)


# ---------------------------------------------------------------- the command


def test_the_command_says_what_it_wrote(base: Path, tmp_path: Path) -> None:
    make(tmp_path / "official", base, r=16, hybrid_r=8, bias="all")
    result = call("import-official", "official", "out", cwd=tmp_path)
    first, note = result.stdout.splitlines()
    assert first == "out: a GraLoRA adapter of 8 layers, r 8, hybrid_r 8, alpha 20"
    assert note.startswith("note: the training changed biases (bias is 'all')")
    assert result.returncode == 0 and not result.stderr
    result = call("import-official", "out", "again", cwd=tmp_path)
    assert result.returncode == 2 and "out/adapter_config.json is not that of a checkpoint of Squeeze" in sentence(
        result
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official", "out"]
