# SPDX-License-Identifier: Apache-2.0
"""An exported LoRA, loaded by stock PEFT, computes what the GraLoRA computes; truncated, it is as near as any of its rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import gpt2, gralora, llama, save_adapter, save_base
from export_helpers import CONFIG, WEIGHTS, assert_same_outputs, gralora_logits, logits, written
from safetensors.torch import load_file, save_file
from torch import Tensor
from tuner_helpers import needs_new_peft

import gralora_ext
from gralora_ext.checkpoint.export import SERVED_RANKS, export_lora
from gralora_ext.program.errors import FileError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), llama())


@pytest.fixture(scope="module")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("gpt2"), gpt2())


FIELDS = {
    "k = 1": {"gralora_k": 1},
    "k = 2": {"gralora_k": 2},
    "k = 4, a scaling that is no power of two": {"gralora_k": 4, "alpha": 11},
    "hybrid": {"hybrid_r": 3, "r": 4},
    "a regular expression": {"target_modules": r".*\.[01]\.(self_attn\.q|mlp\.up)_proj"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["v_proj", "up_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}
OWN_FIELDS = {
    "patterns": {
        "rank_pattern": {"q_proj": 16, "layers.0.self_attn.v_proj": 4},
        "alpha_pattern": {"up_proj": 5, "layers.1.mlp.down_proj": 2.5},
        "k_pattern": {"v_proj": 4},
        "hybrid_r": 2,
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 16}},
    "exclude_modules": {"exclude_modules": ["q_proj"]},
}
CASES = [
    *(pytest.param(fields, id=name) for name, fields in FIELDS.items()),
    *(pytest.param(fields, id=name, marks=needs_new_peft) for name, fields in OWN_FIELDS.items()),
]


@pytest.mark.parametrize("fields", CASES)
def test_stock_pefts_lora_computes_the_same(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    def change(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01

    save_adapter(tmp_path / "a", base, gralora(**fields), change=change)
    report = export_lora(tmp_path / "a", tmp_path / "lora")
    assert_same_outputs(base, tmp_path / "a", tmp_path / "lora")
    assert {layer.error for layer in report.layers} == {0.0} and not report.notes
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("bias", ["gralora_only", "all"])
def test_conv1d_and_trained_biases_compute_the_same(gpt2_base: Path, tmp_path: Path, bias: str) -> None:
    def change(model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 0.1 if parameter.requires_grad else 0

    config = gralora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, bias=bias, hybrid_r=2)
    save_adapter(tmp_path / "a", gpt2_base, config, change=change)
    export_lora(tmp_path / "a", tmp_path / "lora")
    assert_same_outputs(gpt2_base, tmp_path / "a", tmp_path / "lora")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_exact_form_holds_the_adapters_elements_bit_for_bit(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj"], gralora_k=4, alpha=7))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    export_lora(tmp_path / "a", tmp_path / "lora")
    config, factors = written(tmp_path / "lora")
    assert (config["r"], config["lora_alpha"]) == (32, 28) and len(factors) == 4
    for layer in (
        "base_model.model.model.layers.0.self_attn.q_proj",
        "base_model.model.model.layers.1.self_attn.q_proj",
    ):
        A, B = factors[f"{layer}.lora_A.weight"], factors[f"{layer}.lora_B.weight"]
        assert A.dtype == B.dtype == dtype
        for n in range(4):
            for j in range(4):
                ranks = slice((n * 4 + j) * 2, (n * 4 + j + 1) * 2)
                own_A, own_B = A[ranks].clone(), B[:, ranks].clone()
                inputs, outputs = slice(n * 8, n * 8 + 8), slice(j * 8, j * 8 + 8)
                assert torch.equal(own_A[:, inputs], tensors[f"{layer}.gralora_A"][n, :, j * 2 : j * 2 + 2].T)
                assert torch.equal(own_B[outputs], tensors[f"{layer}.gralora_B"][j, n * 2 : n * 2 + 2].T)
                own_A[:, inputs], own_B[outputs] = 0, 0
                assert not own_A.any() and not own_B.any()


def test_parts_of_different_dtypes_lose_nothing(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj"], hybrid_r=2, r=4))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({n: t if "general" in n else t.bfloat16() for n, t in tensors.items()}, tmp_path / "a" / WEIGHTS)
    export_lora(tmp_path / "a", tmp_path / "lora")
    _, factors = written(tmp_path / "lora")
    for name, tensor in factors.items():
        general = tensors[name.replace("lora_", "gralora_").replace(".weight", "_general.weight")]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor[8:] if "lora_A" in name else tensor[:, 8:], general)


def deltas(folder: Path) -> dict[str, Tensor]:
    """ΔW of each layer of a LoRA in a folder, in float64, by PEFT's words for rank and alpha."""
    config, tensors = written(folder)
    found = {}
    for name in sorted(tensors):
        if name.endswith("lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B, A = tensors[name.replace("lora_A", "lora_B")].double(), tensors[name].double()
            rank, alpha = (
                next((v for k, v in config[pattern].items() if k == f"^{layer}".replace(".", r"\.")), config[field])
                for pattern, field in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
            )
            assert rank == A.shape[0] == B.shape[1]
            found[layer] = alpha / rank * (B @ A)
    return found


@pytest.mark.parametrize("hybrid", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_truncated_rank_is_as_near_as_the_dense_optimum(
    base: Path, tmp_path: Path, hybrid: int, dtype: torch.dtype
) -> None:
    patterns = {"target_modules": ["q_proj", "down_proj", "k_proj"], "hybrid_r": hybrid, "gralora_k": 4}
    save_adapter(tmp_path / "a", base, gralora(**patterns))
    save_file({n: t.to(dtype) for n, t in load_file(tmp_path / "a" / WEIGHTS).items()}, tmp_path / "a" / WEIGHTS)
    export_lora(tmp_path / "a", tmp_path / "exact")
    exact = deltas(tmp_path / "exact")
    for rank in (1, 5, 14, 31):
        report = export_lora(tmp_path / "a", tmp_path / f"{rank}", rank=rank)
        cut = deltas(tmp_path / f"{rank}")
        assert [layer.name for layer in report.layers] == sorted(exact) == sorted(cut)
        for name, _, kept, told in report.layers:
            S = torch.linalg.svdvals(exact[name])
            least, error = S[rank:].norm() / S.norm(), (cut[name] - exact[name]).norm() / exact[name].norm()
            assert kept == rank and abs(error - least) < 1e-6 and abs(told - least) < 1e-6


@needs_new_peft
def test_layers_with_fewer_ranks_than_asked_for_stay_exact(base: Path, tmp_path: Path) -> None:
    with gralora_ext.enable():
        save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 4}))
    report = export_lora(tmp_path / "a", tmp_path / "lora", rank=10)
    assert {(layer.exact_rank, layer.rank, layer.error == 0) for layer in report.layers} == {
        (8, 8, True),
        (16, 10, False),
    }
    config, _ = written(tmp_path / "lora")
    assert len(config["rank_pattern"]) == 2
    assert (logits(base, tmp_path / "lora") - gralora_logits(base, tmp_path / "a")).abs().max() < 1


# ---------------------------------------------------------------- for vLLM


@needs_new_peft
def test_for_vllm_all_layers_have_one_rank_that_it_serves_and_the_scaling_one(base: Path, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"up_proj": 5}, "hybrid_r": 2, "use_rslora": True}
    save_adapter(tmp_path / "a", base, gralora(**patterns, bias="all"))  # a Llama has none, and vLLM refuses the word
    report = export_lora(tmp_path / "a", tmp_path / "lora", serve_for="vllm")  # k·r + h is 34 and 18
    config, tensors = written(tmp_path / "lora")
    assert config["r"] == config["lora_alpha"] == 64 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["bias"] == "none" and config["modules_to_save"] is None and not config["use_rslora"]
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in tensors.items()} == {64}
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert {layer.error for layer in report.layers} == {0.0} and not report.notes
    assert_same_outputs(base, tmp_path / "a", tmp_path / "lora")


def test_for_vllm_ranks_beyond_those_served_are_cut_and_it_is_said(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SERVED_RANKS, "vllm", (4, 8, 12))
    save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj"]))
    report = export_lora(tmp_path / "a", tmp_path / "lora", serve_for="vllm")  # k·r is 16
    assert {layer.rank for layer in report.layers} == {12}
    largest = max(layer.error for layer in report.layers)
    (note,) = report.notes
    assert note == (
        "k·r + hybrid_r is up to 16, and vllm serves ranks up to 12: 2 of 2 layers are truncated to it, with relative errors up to "
        f"{largest:.1e}"
    )


def test_for_vllm_the_rank_is_one_that_it_serves(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj"]))
    report = export_lora(tmp_path / "a", tmp_path / "lora", rank=8, serve_for="vllm")
    assert {(layer.rank, layer.error > 0) for layer in report.layers} == {(8, True)}
    with pytest.raises(ValueError, match=r"rank: expected one that vllm serves \(8, 16, .* 512\), got 10"):
        export_lora(tmp_path / "a", tmp_path / "other", rank=10, serve_for="vllm")
    with pytest.raises(ValueError, match="serve_for: expected one of vllm, got 'tgi'"):
        export_lora(tmp_path / "a", tmp_path / "other", serve_for="tgi")
    for rank in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="rank: expected a positive integer"):
            export_lora(tmp_path / "a", tmp_path / "other", rank=rank)
    assert not (tmp_path / "other").exists()


def test_for_vllm_what_is_trained_whole_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, gralora(modules_to_save=["lm_head"]))
    with pytest.raises(FileError, match=r"\(lm_head.weight\), which vllm does not serve .*`gralora-ext merge`"):
        export_lora(tmp_path / "a", tmp_path / "lora", serve_for="vllm")
