# SPDX-License-Identifier: Apache-2.0
"""Another adapter in the place of the loaded one: in the same tensors and graphs, or refused without any change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_helpers import config, delta, layers
from helpers import same_bits
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap
from safetensors.torch import load_file, save_file
from torch import Tensor
from tuner_helpers import DEVICE, Conv1DMlp, Mlp, assert_same_output, fused_layers, needs_new_peft, rows

from gralora_ext.tuner import accelerate, disable, enable, restore

# Of smaller rank, another scaling, with root scaling, without the hybrid part, in one layer alone.
OTHERS: dict[str, Any] = {
    "same": {"r": 8, "alpha": 24, "hybrid_r": 4},
    "smaller": {"r": 4, "alpha": 5, "hybrid_r": 2},
    "rslora": {"r": 6, "alpha": 7, "hybrid_r": 4, "use_rslora": True},
    "no hybrid": {"r": 2, "alpha": 24, "hybrid_r": 0},
    "one layer": {"r": 8, "alpha": 3, "hybrid_r": 4, "target_modules": ["second"]},
    "patterns": {"rank_pattern": {"first": 2}, "alpha_pattern": {"second": 9}, "r": 8, "hybrid_r": 1},
}
FIRST = {"r": 8, "alpha": 24, "hybrid_r": 4}

pytestmark = needs_new_peft


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    with enable():
        yield


def built(seed: int = 0, base: Any = Mlp, dtype: torch.dtype = torch.float64, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    model = base().to(DEVICE, dtype)
    torch.manual_seed(seed)
    fan = {"fan_in_fan_out": True} if base is Conv1DMlp else {}
    return get_peft_model(model, config(**{**FIRST, **fan, **fields})).eval()


def saved(folder: Path, seed: int = 5, **fields: Any) -> tuple[str, PeftModel]:
    """The folder of another adapter, and its model."""
    model = built(seed, **fields)
    model.save_pretrained(folder)
    return str(folder), model


def swap(model: Any, folder: str) -> None:
    hotswap.hotswap_adapter(model, folder, "default", torch_device=str(DEVICE))


def state(model: torch.nn.Module) -> dict[str, Any]:
    tensors = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    return {**tensors, "scaling": [dict(layer.scaling) for layer in layers(model).values()]}


def assert_unchanged(model: torch.nn.Module, before: dict[str, Any]) -> None:
    now = state(model)
    assert now.keys() == before.keys() and now["scaling"] == before["scaling"]
    for name in now.keys() - {"scaling"}:
        assert now[name][0] == before[name][0] and same_bits(now[name][1], before[name][1]), name


@pytest.mark.parametrize("base", [Mlp, Conv1DMlp])
@pytest.mark.parametrize("other", OTHERS)
def test_a_swapped_model_is_the_other_one_in_the_same_tensors(other: str, base: Any, tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, base=base, **OTHERS[other])
    model = built(base=base)
    parameters = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    scalings = [dict(layer.scaling) for layer in layers(model).values()]
    swap(model, folder)
    assert_same_output(model(rows(5)), expected(rows(5)))
    for name, p in model.named_parameters():
        assert p is parameters[name][0] and p.data_ptr() == parameters[name][1]
    assert [dict(layer.scaling) for layer in layers(model).values()] == scalings
    model.save_pretrained(tmp_path / "again")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(base().double().to(DEVICE), tmp_path / "again")
    assert_same_output(again(rows(5)), expected(rows(5)))


def test_a_swap_of_equal_scaling_is_to_the_bit(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path)
    model = built()
    swap(model, folder)
    for name, p in expected.named_parameters():
        assert same_bits(model.get_parameter(name).detach(), p.detach())


@pytest.mark.parametrize("rslora", [False, True])
def test_prepared_models_compute_and_save_the_same(rslora: bool, tmp_path: Path) -> None:
    model = built(rank_pattern={"second": 4}, alpha_pattern={"first": 7}, use_rslora=rslora)
    expected, deltas = model(rows(5)).detach(), [delta(layer, "default") for layer in layers(model).values()]
    layers(model)["first"].set_scale("default", 3.0)
    parameters = dict(model.named_parameters())
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=12, config=model.peft_config)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    layers(model)["first"].unscale_layer()
    assert_same_output(model(rows(5)), expected)
    for layer, before in zip(layers(model).values(), deltas, strict=True):
        assert layer.gralora_A["default"].shape[2] == layer.gralora_B["default"].shape[1] == layer.r["default"] == 12
        assert layer.hybrid_r["default"] == 4
        torch.testing.assert_close(delta(layer, "default"), before, rtol=1e-12, atol=1e-14)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert_same_output(PeftModel.from_pretrained(Mlp().double().to(DEVICE), tmp_path)(rows(5)), expected)


def test_prepared_with_pefts_own_configuration_is_read_by_stock_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {**FIRST, "target_modules": ["first", "second"], "init_weights": False}
    model = get_peft_model(Mlp().double().to(DEVICE), peft.GraloraConfig(**fields))
    folder, expected = saved(tmp_path / "other", **OTHERS["smaller"])
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=16)
    swap(model, folder)
    model.save_pretrained(tmp_path / "swapped")
    restored = restore(model)
    disable()
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Mlp().double().to(DEVICE), tmp_path / "swapped")
    assert restored.converted == 2 and not fused_layers(again)
    for one in (model, again):
        assert_same_output(one(rows(5)), expected(rows(5)))


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model_is_not_compiled_again(training: bool, tmp_path: Path) -> None:
    others = [saved(tmp_path / name, **fields) for name, fields in OTHERS.items()]
    others.append(saved(tmp_path / "larger", r=12, alpha=5, hybrid_r=4))
    model = built().train(training)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=12, config=model.peft_config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = rows(5).requires_grad_(training)
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for folder, expected in others:
            swap(compiled, folder)
            y = compiled(x)
            assert_same_output(y, expected(x))
            if training:
                y.sum().backward()


def test_without_a_fixed_scaling_it_would_be_compiled_again(tmp_path: Path) -> None:
    """So the test above can fail: a layer's scaling is a constant of the graph."""
    model = built()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(rows(5))
    layers(model)["first"].set_scale("default", 3.0)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(rows(5))


def test_layers_that_peft_built_are_swapped_too(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, **OTHERS["rslora"])
    disable()
    torch.manual_seed(0)
    fields = {**FIRST, "target_modules": ["first", "second"], "init_weights": False}
    model = get_peft_model(Mlp().double().to(DEVICE), peft.GraloraConfig(**fields))
    with enable():
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=12)
        swap(model, folder)
    assert not fused_layers(model)
    assert_same_output(model(rows(5)), expected(rows(5)))
    accelerate(model)
    assert_same_output(model(rows(5)), expected(rows(5)))


def test_bfloat16_rounds_B_once(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, alpha=5)
    model = built()
    for layer in layers(model).values():
        layer.to(torch.bfloat16)
    swap(model, folder)
    for layer, other in zip(layers(model).values(), layers(expected).values(), strict=True):
        B, wanted = layer.gralora_B["default"].detach(), other.gralora_B["default"].detach() * (5 / 24)
        assert same_bits(B, wanted.to(torch.bfloat16))


def test_a_swap_undoes_a_scaling_that_was_set_as_loras_does(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path)
    model = built()
    layers(model)["first"].set_scale("default", 3.0)
    swap(model, folder)
    assert_same_output(model(rows(5)), expected(rows(5)))


def test_loras_still_go_to_pefts_functions(tmp_path: Path) -> None:
    def lora(seed: int, **fields: Any) -> PeftModel:
        torch.manual_seed(0)
        base = Mlp().double().to(DEVICE)
        torch.manual_seed(seed)
        return get_peft_model(base, LoraConfig(target_modules=["first"], init_lora_weights=False, **fields))

    model, expected = lora(1, r=4), lora(2, r=2, lora_alpha=3)
    expected.save_pretrained(tmp_path)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    assert isinstance(model.base_model.model.first.scaling["default"], Tensor) and model.peft_config["default"].r == 6
    swap(model, str(tmp_path))
    torch.testing.assert_close(model(rows(5)), expected(rows(5)), rtol=1e-6, atol=1e-6)  # a float32 scaling


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 10}, ValueError, r"first: the new adapter's r is 10, .*room for 8: call prepare_model_.*target_rank=10"),
        ({"hybrid_r": 5}, ValueError, "first: the new adapter's hybrid_r is 5, and the model has room for 4"),
        ({"gralora_k": 4}, ValueError, "first: the new adapter's gralora_k must be the old one's, 2, but is 4"),
        ({"gralora_dropout": 0.1}, ValueError, "Configs are incompatible: for gralora_dropout, 0.0 != 0.1"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(fields: Any, error: Any, message: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, **fields)
    model = built()
    before = state(model)
    with pytest.raises(error, match=message):
        swap(model, folder)
    assert_unchanged(model, before)


def test_a_layer_that_the_model_has_not_adapted_is_named(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    model = built(target_modules=["second"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"no place for: base_model.model.first.gralora_A.default, "):
        swap(model, folder)
    assert all(same_bits(p.detach(), before[n]) for n, p in model.named_parameters())


def test_a_merged_adapter_and_tensors_of_another_shape_are_refused() -> None:
    model, other = built(), built(5)
    tensors = {n: p.detach() for n, p in other.named_parameters() if "gralora_" in n}
    arguments = {"adapter_name": "default", "config": config(**FIRST), "parameter_prefix": "gralora_"}
    before = state(model)
    name = "base_model.model.second.gralora_B.default"
    for wrong in ({**tensors, name: tensors[name][:, :6]}, {n: t for n, t in tensors.items() if n != name}):
        with pytest.raises(ValueError, match="second: the new adapter's weights must be .* but are"):
            hotswap.hotswap_adapter_from_state_dict(model, wrong, **arguments)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter_name: 'default' is merged into the base weights"):
        hotswap.hotswap_adapter_from_state_dict(model, tensors, **arguments)
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name][1])
    hotswap.hotswap_adapter_from_state_dict(model, tensors, **arguments)
    assert_same_output(model(rows(5)), other(rows(5)))


@pytest.mark.parametrize("rank", [6, 13])
def test_a_target_rank_that_does_not_fit_changes_nothing(rank: int) -> None:
    model = built()
    before = state(model)
    message = rf"target_rank: expected a multiple of gralora_k, which is 2, and at least r, which is 8, .*got {rank}"
    with pytest.raises(ValueError, match=message):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=rank, config=model.peft_config)
    assert_unchanged(model, before)
    assert model.peft_config["default"].r == 8


def test_prepare_comes_before_compile() -> None:
    prepare = hotswap.prepare_model_for_compiled_hotswap
    compiled = torch.compile(built(), backend="eager")
    with pytest.raises(ValueError, match="the model is compiled already"):
        prepare(compiled, target_rank=12)
    with pytest.warns(UserWarning, match="the model is compiled already"):
        prepare(compiled, target_rank=12, check_compiled="warn")
    prepare(compiled, target_rank=14, check_compiled="ignore")
    assert layers(compiled)["first"].r["default"] == 14
    with pytest.raises(ValueError, match="check_compiled: expected 'error', 'warn' or 'ignore', got 'perhaps'"):
        prepare(compiled, target_rank=16, check_compiled="perhaps")
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare(Mlp(), target_rank=12)


def test_an_older_peft_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved(tmp_path)
    model = built()
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(RuntimeError, match=r"^hotswap_adapter: GraLoRA needs peft 0.21.0 or newer, found 0.20.0"):
        swap(model, folder)
    with pytest.raises(RuntimeError, match=r"^prepare_model_for_compiled_hotswap: GraLoRA needs peft 0.21.0 or newer"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ["second"], "target_modules": ["first"]}, "base_model.model.second was trained too"),
        ({"bias": "gralora_only"}, "expected bias 'none', got 'gralora_only' of the loaded adapter"),
    ],
    ids=["modules_to_save", "bias"],
)
def test_what_was_trained_beside_the_layers_is_not_left_behind(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, (folder, _) = built(**fields), saved(tmp_path, target_modules=["first"])
    expected = model(rows(3))
    with pytest.raises(ValueError, match=message):
        swap(model, folder)
    assert same_bits(model(rows(3)), expected)


def test_an_offloaded_adapter_is_not_swapped_in_vain(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model, (folder, _) = built(), saved(tmp_path)
    cpu_offload(model, DEVICE)
    with pytest.raises(ValueError, match="first: the weights of adapter 'default' are on meta"):
        swap(model, folder)


def test_a_checkpoint_in_bfloat16_is_rounded_no_more_than_it_is(tmp_path: Path) -> None:
    """The quotient of the scalings, 2/3, is taken of what the parameters hold, which are float32."""
    folder, other_model = saved(tmp_path, alpha=16, dtype=torch.float32)
    file = tmp_path / "adapter_model.safetensors"
    small = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(small, file, {"format": "pt"})
    model = built(dtype=torch.float32)
    swap(model, folder)
    for layer, other in zip(layers(model).values(), layers(other_model).values(), strict=True):
        written = other.gralora_B["default"].detach().bfloat16().float()
        torch.testing.assert_close(layer.gralora_B["default"].detach(), written * (16 / 24), rtol=2**-23, atol=0)
