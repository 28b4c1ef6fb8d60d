# SPDX-License-Identifier: Apache-2.0
"""Quantized base layers are trained and evaluated, merged as Q(D(W) + dW), and unmerged bit for bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import quantized_models
import torch
from helpers import same_bits
from peft import GraloraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from quantized_models import BITSANDBYTES, KINDS, TORCHAO, bits, dequantized, llama, need, quantized, quantized_like
from torch import Tensor, nn
from tuner_helpers import fused_layers, tokens

from gralora_ext import GraloraLinear, accelerate, enable, reference, restore
from gralora_ext.tuner import quantized as quantized_bases

pytestmark = pytest.mark.skipif(quantized_bases.NEEDS != "", reason="quantized bases need PEFT 0.21")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(**fields: Any) -> GraloraConfig:
    defaults = {"r": 8, "alpha": 16, "gralora_k": 2, "hybrid_r": 2, "target_modules": TARGETS, "init_weights": False}
    return GraloraConfig(task_type="CAUSAL_LM", **{**defaults, **fields})


def adapted(kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    base = quantized(kind, dtype)
    torch.manual_seed(1)
    with enable():
        return get_peft_model(base, config(**fields))


def layers_of(model: nn.Module) -> dict[str, GraloraLinear]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, GraloraLinear)}
    assert len(found) == 2 * len(TARGETS)
    return found


def all_bits(model: nn.Module) -> dict[str, Tensor]:
    return {f"{n}.{k}": t for n, layer in layers_of(model).items() for k, t in bits(layer.get_base_layer()).items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    assert [name for name in expected if not same_bits(actual[name], expected[name])] == []


def differs(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return any(not same_bits(actual[name], expected[name]) for name in expected)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(2, 8)).logits


def step(model: nn.Module, lr: float = 0.0) -> tuple[float, dict[str, Tensor]]:
    """The loss of a training step, and its gradients; with ``lr`` the parameters take it."""
    model.train()
    model.zero_grad()
    ids = tokens(4, 16)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    return loss.item(), gradients


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_of_base_and_path(kind: str) -> None:
    layer = next(iter(layers_of(adapted(kind)).values())).train()
    base = layer.get_base_layer()
    x = torch.randn(2, 40, base.in_features, generator=torch.Generator().manual_seed(0))
    g = torch.randn(2, 40, base.out_features, generator=torch.Generator().manual_seed(1))
    adapter = [t.detach().clone().requires_grad_() for t in layer._weights("default")]
    x, x_alone = x.clone().requires_grad_(), x.clone().requires_grad_()
    path = reference.gralora(x_alone, torch.zeros_like(g), *adapter[:2], scaling=layer.scaling["default"],
                             A_general=adapter[2], B_general=adapter[3])  # fmt: skip
    y = layer(x)
    torch.testing.assert_close(y, base(x.detach()) + path, rtol=1e-5, atol=1e-5)
    y.backward(g)
    path.backward(g)
    torch.testing.assert_close(x.grad, x_alone.grad + g @ dequantized(base), rtol=1e-4, atol=1e-4)
    for actual, expected in zip(layer._weights("default"), adapter, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_between_training_steps_changes_nothing(kind: str) -> None:
    model, other = adapted(kind), adapted(kind)
    before = all_bits(model)
    expected = [step(other, 0.1) for _ in range(2)]
    for loss, gradients in expected:
        logits(model)
        actual = step(model, 0.1)
        assert actual[0] == loss
        assert_same_bits(actual[1], gradients)
        logits(model)
    assert_same_bits(all_bits(model), before)
    model.merge_adapter()
    other.merge_adapter()
    assert_same_bits(all_bits(model), all_bits(other))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_layers_without_an_adapter(kind: str) -> None:
    model = adapted(kind, target_modules=r".*layers\.0\.self_attn\.q_proj")
    logits(model)
    plain = llama()
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            base = model.base_model.model.get_submodule(name)
            base = base.get_base_layer() if isinstance(base, GraloraLinear) else base
            module.weight.data = dequantized(base).detach().clone()
    torch.manual_seed(1)
    with enable():
        plain = get_peft_model(plain, config(target_modules=r".*layers\.0\.self_attn\.q_proj"))
    actual, expected = step(model)[1], step(plain)[1]
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():  # the input of torchao's dynamic layers is rounded to 8 bits
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error < (0.05 if kind == "torchao int8 dynamic" else 1e-4), name


@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_q_of_the_sum_and_unmerged_is_the_old_bits(kind: str, safe: bool) -> None:
    model = adapted(kind)
    before, y = all_bits(model), logits(model)
    expected = {}
    for name, layer in layers_of(model).items():
        total = dequantized(layer.get_base_layer()).float() + layer.get_delta_weight("default")
        expected[name] = (total, quantized_like(kind, layer.get_base_layer(), total))
    step(model)
    model.merge_adapter(safe_merge=safe)
    merged = logits(model)
    for name, layer in layers_of(model).items():
        total, made = expected[name]
        assert_same_bits(bits(layer.get_base_layer()), bits(made))
        lost = dequantized(layer.get_base_layer()) - total
        assert layer.merge_errors["default"] == pytest.approx(
            (lost.norm() / layer.get_delta_weight("default").norm()).item(), rel=1e-4
        )
    assert differs(all_bits(model), before)
    assert (merged - y).norm() < 0.3 * y.norm()
    model.unmerge_adapter()
    assert_same_bits(all_bits(model), before)
    assert all(layer.merge_errors == {} and not layer.merged for layer in layers_of(model).values())
    assert torch.equal(logits(model), y)
    loss, gradients = step(model)
    assert loss == step(adapted(kind))[0] and len(gradients) == 4 * 2 * len(TARGETS)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_merged_one_after_the_other_are_unmerged_together(kind: str) -> None:
    model = adapted(kind)
    model.add_adapter("other", config(r=4, gralora_k=1, hybrid_r=0))
    before = all_bits(model)
    layer = layers_of(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    expected = layer.get_base_layer()
    for adapter in ("default", "other"):
        expected = quantized_like(kind, expected, dequantized(expected).float() + layer.get_delta_weight(adapter))
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert_same_bits(bits(layer.get_base_layer()), bits(expected))
    assert layer.merged_adapters == list(layer.merge_errors) == ["default", "other"]
    model.unmerge_adapter()
    assert_same_bits(all_bits(model), before)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_merging_an_adapter_of_zeros_loses_nothing_or_says_so(kind: str) -> None:
    model = adapted(kind, init_weights=True)  # B is zero
    before = all_bits(model)
    model.merge_adapter()
    for layer in layers_of(model).values():
        lost = layer.merge_errors["default"]
        assert lost in (0.0, math.inf)
    if not differs(all_bits(model), before):
        assert all(layer.merge_errors["default"] == 0.0 for layer in layers_of(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_leaves_the_quantized_model(kind: str) -> None:
    model, other = adapted(kind), adapted(kind)
    kinds = {name: type(layer.get_base_layer()) for name, layer in layers_of(model).items()}
    other.merge_adapter()
    expected, merged = logits(other), model.merge_and_unload()
    assert not any("gralora" in name for name, _ in merged.named_parameters())
    for name, cls in kinds.items():
        assert type(merged.get_submodule(name.removeprefix("base_model.model."))) is cls
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=0.05)  # bitsandbytes may repack it again
    base = adapted(kind).unload()
    torch.testing.assert_close(logits(base), logits(quantized(kind)), rtol=0, atol=0)


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_no_hook_stays_on_a_model_that_is_unloaded(end: str) -> None:
    model = adapted("torchao int8 dynamic")
    assert hooked(model)
    assert not hooked(getattr(model, end)())


def test_no_hook_stays_on_a_model_that_is_wholly_restored() -> None:
    model = adapted("torchao int8 dynamic")
    before = hooked(model)
    assert len(restore(model).skipped) == 2 * len(TARGETS) and hooked(model) == before
    for layer in layers_of(model).values():  # as where nobody says how the weight was made
        layer.quantization_backend = None
    assert restore(model).skipped == [] and not hooked(model)


def hooked(model: nn.Module) -> list[str]:
    hook = quantized_bases.straight_through
    return [name for name, module in model.named_modules() if hook in module._forward_hooks.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_adapter_is_not_merged_safely(kind: str) -> None:
    model = adapted(kind)
    layer = next(iter(layers_of(model).values()))
    with torch.no_grad():
        layer.gralora_B["default"][0, 0, 0] = float("inf")
    before = all_bits(model)
    with pytest.raises(ValueError, match="The adapter default seems to be broken.*NaN or infinity"):
        layer.merge(safe_merge=True)
    assert_same_bits(all_bits(model), before)
    assert not layer.merged and layer.kept_weight == ()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_saved_and_loaded_as_over_any_base(kind: str, tmp_path: Any) -> None:
    model = adapted(kind)
    step(model, 0.1)
    model.save_pretrained(tmp_path)
    with enable():
        loaded = PeftModel.from_pretrained(quantized(kind), tmp_path)
    assert_same_bits(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    assert torch.equal(logits(loaded), logits(model))
    plain = llama()
    torch.manual_seed(1)
    with enable():
        plain = get_peft_model(plain, config())
    assert_same_bits(get_peft_model_state_dict(adapted(kind)), get_peft_model_state_dict(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_loss(kind: str) -> None:
    model = adapted(kind, init_weights=True)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(8):
        losses.append(step(model)[0])
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_can_be_copied_and_unmerged(kind: str) -> None:
    model = adapted(kind)
    before = all_bits(model)
    model.merge_adapter()
    merged, other = all_bits(model), copy.deepcopy(model)
    other.unmerge_adapter()
    assert_same_bits(all_bits(other), before)
    assert_same_bits(all_bits(model), merged)


@pytest.mark.parametrize("kind", [*BITSANDBYTES, *TORCHAO])
def test_accelerated_layers_merge_and_unmerge(kind: str) -> None:
    base = quantized(kind)
    torch.manual_seed(1)
    model = get_peft_model(base, config())
    assert accelerate(model).converted == 2 * len(TARGETS)
    before, expected = all_bits(model), adapted(kind)
    for each in (model, expected):
        logits(each)
        each.merge_adapter()
    assert_same_bits(all_bits(model), all_bits(expected))
    model.unmerge_adapter()
    assert_same_bits(all_bits(model), before)


@pytest.mark.parametrize("kind", ["nf4", "8 bit", "torchao int8", "hqq"])
def test_restore_names_layers_that_pefts_cannot_be(kind: str) -> None:
    model = adapted(kind)
    reason = "has no weight" if kind == "hqq" else "is quantized, and PEFT's layer cannot merge into it"
    for merge in (False, True):
        if merge:
            model.merge_adapter()
            reason = "merged into its quantized base layer"
        report = restore(model)
        assert report.converted == 0 and len(report.skipped) == 2 * len(TARGETS)
        assert all(reason in said for _, said in report.skipped)
    assert len(fused_layers(model)) == 2 * len(TARGETS)


@pytest.mark.parametrize("kind", ["nf4", "8 bit", "torchao int8", "torchao float8", "hqq"])
def test_a_bfloat16_base_keeps_its_dtype(kind: str) -> None:
    model = adapted(kind, torch.bfloat16)
    layer = next(iter(layers_of(model).values()))
    base, delta = layer.get_base_layer(), layer.get_delta_weight("default")
    assert delta.dtype == torch.float32
    total = dequantized(base).float() + delta
    expected = quantized_like(kind, base, total if kind not in TORCHAO else total.bfloat16())
    layer.merge()
    assert (
        dequantized(base).dtype == dequantized(quantized(kind, torch.bfloat16).model.layers[0].self_attn.q_proj).dtype
    )
    if kind == "nf4":
        assert base.weight.quant_state.dtype == torch.bfloat16
        expected.weight.quant_state.dtype = torch.bfloat16
    expected.bias = base.bias
    assert_same_bits(bits(base), bits(expected))
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", BITSANDBYTES[:3])
def test_a_base_that_was_evaluated_before_gets_its_layout_back(kind: str) -> None:
    base = quantized(kind)
    expected = {n: dequantized(base.get_submodule(n)) for n, _ in base.named_modules() if n.endswith(tuple(TARGETS))}
    y = logits(base)  # on some processors bitsandbytes repacks the weights here, and rounds their statistics
    with enable():
        model = get_peft_model(base, config(init_weights=True))
    for name, weight in expected.items():
        restored = dequantized(model.base_model.model.get_submodule(name).get_base_layer())
        assert (restored - weight).norm() < 0.01 * weight.norm()
    torch.testing.assert_close(logits(model), y, rtol=0, atol=0.05)
    assert step(model)[1]


def test_a_weight_of_which_nobody_says_how_it_was_made_is_refused() -> None:
    need("torchao int8")
    from torchao import quantize_
    from torchao.quantization import Int8WeightOnlyConfig

    base = llama()
    quantize_(base, Int8WeightOnlyConfig())
    with enable():
        model = get_peft_model(base, config())
    assert step(model)[1]
    before = all_bits(model)
    with pytest.raises(TypeError, match="merging needs a dense floating-point base weight.*Int8Tensor"):
        model.merge_adapter()
    assert_same_bits(all_bits(model), before)


def test_settings_of_other_layers_are_noticed_before_anything_is_lost() -> None:
    model = adapted("torchao int8")
    before = all_bits(model)
    layer = next(iter(layers_of(model).values()))
    layer.quantization_backend.get_apply_tensor_subclass = quantized_models.CONFIGS["torchao float8"](
        torch.float32
    ).get_apply_tensor_subclass
    with pytest.raises(TypeError, match="gave Float8Tensor of torch.float32, where the base weight is Int8Tensor"):
        layer.merge()
    assert_same_bits(all_bits(model), before)
    assert not layer.merged


def test_8_bit_layers_that_keep_their_fp16_weight_are_refused() -> None:
    need("8 bit")
    import bitsandbytes as bnb

    base = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True))
    with enable():
        model = get_peft_model(base, GraloraConfig(r=4, gralora_k=2, target_modules=["0"]))
    with pytest.raises(TypeError, match="bitsandbytes' 8 bits, got torch.float32: .*has_fp16_weights"):
        model.merge_adapter()


def gptqmodel_layer(method: str) -> nn.Module:
    """A layer of gptqmodel's, of 4 bits rounded to the nearest."""
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    torch.manual_seed(0)
    linear = nn.Linear(64, 96)
    scales = linear.weight.detach().reshape(96, 2, 32).abs().amax(-1) / 7
    zeros, groups = torch.full_like(scales, 8), torch.arange(64, dtype=torch.int32) // 32
    cls = TorchLinear if method == "gptq" else AwqTorchLinear
    layer = cls(bits=4, group_size=32, sym=True, desc_act=False, in_features=64, out_features=96, bias=True)
    if method == "gptq":
        layer.pack_original(linear, scales, zeros, groups)
    else:
        layer.pack(linear, scales, zeros)
    layer.optimized = True  # it would have its dequantization compiled
    layer.post_init()
    return layer


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layers_of_gptqmodel_are_trained_and_not_merged(method: str) -> None:
    base = nn.Sequential(gptqmodel_layer(method))
    with enable():
        model = get_peft_model(base, GraloraConfig(r=4, gralora_k=2, target_modules=["0"], init_weights=False))
    layer = model.base_model.model[0]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    model.train()
    y, alone = layer(x), layer.base_layer(x.detach())
    assert y.dtype == torch.bfloat16
    expected = alone.float() + x.float() @ layer.get_delta_weight("default").T
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=2**-7)
    y.float().sum().backward()
    assert x.grad is not None and layer.gralora_A["default"].grad is not None
    with pytest.raises(
        TypeError, match="merging needs a base weight that can be quantized again, and (gptq|awq) weights"
    ):
        model.merge_adapter()
    assert not layer.merged
    assert model.unload()[0] is layer.base_layer
