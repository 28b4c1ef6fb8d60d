# SPDX-License-Identifier: Apache-2.0
"""PEFT's conversion to LoRA, of GraLoRA under enable(): exact where the rank suffices, else by the SVD of the factors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model
from peft.tuners.lora import conversion
from torch import Tensor
from tuner_helpers import DEVICE, Conv1DMlp, Mlp, Single, adapted, needs_new_peft, rows

import gralora_ext
from gralora_ext import lora_factors, ops

HYBRID = {"r": 4, "gralora_k": 2, "hybrid_r": 3, "alpha": 10}  # k·r + h = 11


@pytest.fixture(autouse=True)
def enabled() -> Any:
    with gralora_ext.enable():
        yield


@pytest.fixture
def no_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes a dense ΔW, or decomposes one, fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dense weight was made")

    monkeypatch.setattr("gralora_ext.tuner.layer.GraloraLinear.get_delta_weight", refuse)
    monkeypatch.setattr("peft.tuners.gralora.layer.Linear.get_delta_weight", refuse)
    monkeypatch.setattr(ops, "delta_weight", refuse)


@pytest.fixture
def no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was decomposed")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    monkeypatch.setattr(torch.linalg, "qr", refuse)


def product(state: dict[str, Tensor], name: str = "first") -> Tensor:
    """lora_B lora_A of a layer; PEFT makes the scaling of what it converts 1."""
    A, B = (state[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    return B @ A


def delta(model: PeftModel, name: str = "first") -> Tensor:
    layer = getattr(model.base_model.model, name)
    weight = layer.get_delta_weight("default")
    return weight.T if layer.fan_in_fan_out else weight


def outputs(config: Any, state: dict[str, Tensor], base: Any, x: Tensor) -> Tensor:
    """What stock PEFT's LoRA over the same base computes with them."""
    gralora_ext.disable()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
        lora = get_peft_model(base().double(), config).double().eval().to(DEVICE)
    result = peft.set_peft_model_state_dict(lora, state)
    assert not result.unexpected_keys
    return lora(x)


@pytest.mark.parametrize("rank", [11, 12, 40, 1.0])
@pytest.mark.parametrize("base", [Mlp, Conv1DMlp])
@pytest.mark.parametrize("tuner", ["stock", "fused"])
def test_a_rank_that_suffices_is_exact(rank: float, base: Any, tuner: str, no_dense: None, no_svd: None) -> None:
    model = adapted(tuner, base, **HYBRID).eval()
    config, state = convert_to_lora(model, rank=rank)
    assert all(v.shape[0 if "lora_A" in key else 1] == 11 and v.dtype == torch.float64 for key, v in state.items())
    torch.testing.assert_close(outputs(config, state, base, rows(5)), model(rows(5)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_exact_factors_are_the_adapters_elements_and_zeros(k: int) -> None:
    model = adapted("fused", Single, target_modules=["first"], gralora_k=k, alpha=12, dtype=torch.float32)
    _, state = convert_to_lora(model, rank=1.0)
    A, B = (state[f"base_model.model.first.lora_{letter}.weight"] for letter in "AB")
    assert A.shape == (12 * k, 24) and B.shape == (36, 12 * k)
    layer = model.base_model.model.first
    for n in range(k):
        for j in range(k):
            ranks, rb = n * 12 + j * (12 // k), 12 // k
            rows_A, columns_B = (
                A[ranks : ranks + rb].unflatten(1, (k, -1)),
                B[:, ranks : ranks + rb].unflatten(0, (k, -1)),
            )
            assert torch.equal(rows_A[:, n], layer.gralora_A["default"][n, :, j * rb : (j + 1) * rb].T)
            assert torch.equal(columns_B[j], layer.gralora_B["default"][j, n * rb : (n + 1) * rb].T)
            others = [i for i in range(k) if i != n], [i for i in range(k) if i != j]
            assert not rows_A[:, others[0]].any() and not columns_B[others[1]].any()


@pytest.mark.parametrize(
    "fields", [{"r": 12}, {"r": 8, "gralora_k": 4}, HYBRID, {"r": 24, "gralora_k": 1, "hybrid_r": 20}]
)
@pytest.mark.parametrize("rank", [1, 5, 10])
def test_a_smaller_rank_is_as_near_as_the_dense_optimum(fields: dict[str, int], rank: int) -> None:
    model = adapted("fused", Single, target_modules=["first"], **fields)
    dense = delta(model)
    S = torch.linalg.svdvals(dense)
    _, state = convert_to_lora(model, rank=rank)
    assert state["base_model.model.first.lora_A.weight"].shape == (rank, 24)
    error = (dense - product(state)).norm() / dense.norm()
    assert abs(float(error - S[rank:].norm() / S.norm())) < 1e-12
    layer = model.base_model.model.first
    told = lora_factors.decompose(*gralora_ext.tuner.weighted.weights_of(layer, "default")).error(rank)
    assert abs(told - float(error)) < 1e-12


def test_truncation_makes_no_dense_weight(no_dense: None) -> None:
    convert_to_lora(adapted("fused", **HYBRID), rank=3)


@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.999])
def test_a_fraction_takes_the_ranks_that_pefts_conversion_takes(threshold: float) -> None:
    model = adapted("fused", **HYBRID)
    config, state = convert_to_lora(model, rank=threshold)
    gralora_ext.disable()
    expected, theirs = convert_to_lora(model, rank=threshold)
    assert config.rank_pattern == expected.rank_pattern and config.alpha_pattern == expected.alpha_pattern
    for name in ("first", "second"):
        torch.testing.assert_close(product(state, name), product(theirs, name), rtol=0, atol=1e-5)  # theirs: float32


def test_ranks_beyond_those_of_the_weight_are_left_out() -> None:
    model = adapted("fused", Single, target_modules=["first"], gralora_k=4, r=12)  # k·r = 48 of at most 24
    _, state = convert_to_lora(model, rank=40)
    assert state["base_model.model.first.lora_A.weight"].shape == (24, 24)
    torch.testing.assert_close(product(state), delta(model), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_have_the_adapters_dtype_and_one_rounding(dtype: torch.dtype) -> None:
    model = adapted("fused", Single, dtype, target_modules=["first"], alpha=36).to(dtype)  # s = 3
    layer = model.base_model.model.first
    _, state = convert_to_lora(model, rank=24)
    A, B = (state[f"base_model.model.first.lora_{letter}.weight"] for letter in "AB")
    assert A.dtype == B.dtype == dtype
    exact = lora_factors.exact(layer.gralora_A["default"].detach(), layer.gralora_B["default"].detach())
    assert torch.equal(A, exact.lora_A) and torch.equal(B, (exact.lora_B.double() * 3).to(dtype))


@needs_new_peft
def test_layers_with_their_own_r_k_and_alpha_are_exact() -> None:
    patterns = {"rank_pattern": {"second": 8}, "alpha_pattern": {"second": 3}, "k_pattern": {"second": 4}}
    torch.manual_seed(0)
    fields = {"r": 6, "gralora_k": 2, "target_modules": ["first", "second"], "init_weights": False, "use_rslora": True}
    model = get_peft_model(Mlp().double(), gralora_ext.GraloraConfig(**fields, **patterns)).to(DEVICE).double().eval()
    config, state = convert_to_lora(model, rank=12)  # exact in the first layer alone, k·r = 32 in the second
    assert torch.equal(product(state), product(convert_to_lora(model, rank=1.0)[1]))
    assert state["base_model.model.second.lora_A.weight"].shape == (12, 36)
    config, state = convert_to_lora(model, rank=32)
    torch.testing.assert_close(outputs(config, state, Mlp, rows(5)), model(rows(5)), rtol=1e-13, atol=1e-13)


def test_a_layer_without_the_adapter_is_left_out() -> None:
    model = adapted("fused", **HYBRID)
    model.add_adapter("other", peft.GraloraConfig(r=4, target_modules=["second"], init_weights=False))
    config, state = convert_to_lora(model, rank=1.0, adapter_name="other")
    assert config.exclude_modules == {"first"} and not any("first" in name for name in state)


def test_an_untrained_adapter_becomes_zero() -> None:
    model = adapted("fused", init_weights=True)
    for rank in (3, 0.5, 1.0):
        assert not product(convert_to_lora(model, rank=rank)[1]).any()


def test_the_saved_lora_computes_the_same(tmp_path: Path) -> None:
    model = adapted("fused", **HYBRID, modules_to_save=None).eval()
    peft.save_as_lora(tmp_path, model, rank=1.0)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Mlp().double(), tmp_path).double().eval().to(DEVICE)
    torch.testing.assert_close(again(rows(5)), model(rows(5)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [-1, -0.5])
def test_a_rank_that_is_none_is_refused(rank: float) -> None:
    with pytest.raises(ValueError, match="rank"):
        convert_to_lora(adapted("fused"), rank=rank)


def test_what_is_not_finite_is_refused_where_it_would_be_decomposed() -> None:
    model = adapted("fused")
    with torch.no_grad():
        model.base_model.model.first.gralora_A["default"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="the adapter holds NaN or infinity"):
        convert_to_lora(model, rank=3)


def test_a_compiled_conversion_gives_the_same() -> None:
    model = adapted("fused", **HYBRID)
    _, state = convert_to_lora(model, rank=1.0, compile_kwargs={"backend": "eager"})
    for name in ("first", "second"):
        assert torch.equal(product(state, name), product(convert_to_lora(model, rank=1.0)[1], name))


def test_other_layers_go_on_through_pefts_own_code() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Single(), peft.LoHaConfig(r=2, target_modules=["first"], init_weights=False))
    _, state = convert_to_lora(model, rank=4)
    gralora_ext.disable()
    _, theirs = convert_to_lora(model, rank=4)
    assert torch.equal(product(state), product(theirs))


def test_disable_puts_pefts_function_back() -> None:
    ours = conversion._convert_module_to_lora
    gralora_ext.disable()
    theirs = conversion._convert_module_to_lora
    assert theirs.__module__ == conversion.__name__ and ours.__module__ == "gralora_ext.tuner.convert"
