# SPDX-License-Identifier: Apache-2.0
"""What training and serving code does with a model: checkpointing, autocast, copies, pickles, compilation."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_python, same_bits
from torch import nn
from tuner_helpers import (
    DEVICE,
    Mlp,
    adapted,
    assert_same_gradients,
    assert_same_output,
    fused_layers,
    gradients,
    llama,
    pair,
    rows,
    tokens,
)

from gralora_ext.tuner import accelerate


def losses_of_training(model: nn.Module, autocast: torch.dtype | None = None) -> list[float]:
    """Five steps of AdamW over two batches."""
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        batch = tokens(4, 8, seed=step % 2)
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_takes_pefts_steps() -> None:
    models = pair(llama, hybrid_r=2, target_modules="all-linear")
    losses = [losses_of_training(model) for model in models]
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    assert losses[1][4] < losses[1][0] - 0.1
    assert_same_gradients(models[1], models[0])


@pytest.mark.parametrize(
    ("dtype", "autocast", "apart"),
    [
        (torch.float32, None, 1e-4),
        (torch.float32, torch.bfloat16, 5e-3),
        (torch.float32, torch.float16, 3e-3),
        (torch.bfloat16, None, 5e-3),
    ],
    ids=["fp32", "fp32 autocast bf16", "fp32 autocast fp16", "bf16"],
)
def test_training_in_less_precision_goes_pefts_way(
    dtype: torch.dtype, autocast: torch.dtype | None, apart: float
) -> None:
    """To the roundings of the dtype; their adapters are float32 throughout."""
    models = pair(llama, dtype, hybrid_r=2, target_modules="all-linear")
    losses = [losses_of_training(model, autocast) for model in models]
    assert losses[1] == pytest.approx(losses[0], rel=apart)
    assert losses[1][4] < losses[1][0] - 0.1
    assert {g.dtype for g in gradients(models[1]).values()} == {torch.float32}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, dropout: float) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapted("fused", llama, target_modules="all-linear", gralora_dropout=dropout, hybrid_r=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        batch = tokens(2, 8)
        model(input_ids=batch, labels=batch).loss.backward()
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys() and results[0]
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-12, atol=1e-14)
    if dropout:
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        assert any(not torch.allclose(gradients(model)[name], results[1][name]) for name in results[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_gives_pefts_dtypes_and_no_larger_error(dtype: torch.dtype) -> None:
    x = rows(30, dtype=torch.float32).requires_grad_()
    exact = adapted("stock", hybrid_r=3)(x.double())
    errors = []
    for model in pair(dtype=torch.float32, hybrid_r=3):
        with torch.autocast(DEVICE.type, dtype):
            y = model(x)
        y.square().sum().backward()
        assert y.dtype == torch.float32
        assert {g.dtype for g in gradients(model).values()} == {torch.float32} and len(gradients(model)) == 8
        errors.append((y - exact).norm() / exact.norm())
    assert errors[1] <= errors[0] < 0.05


def test_a_general_part_that_was_cast_alone_is_computed_in_the_dtype_of_the_blocks() -> None:
    """What casts modules that have a weight, as TRL casts a head for bfloat16, finds no blocks."""
    model, x = adapted("fused", dtype=torch.float32, hybrid_r=3), rows(30, dtype=torch.float32)
    layers = [model.base_model.model.first, model.base_model.model.second]
    for layer in layers:
        for part in (layer.gralora_A_general, layer.gralora_B_general):
            part["default"].weight.data = part["default"].weight.data.bfloat16().float()
    expected = model(x)
    expected.square().sum().backward()
    grads = gradients(model)
    model.zero_grad()
    for layer in layers:
        layer.gralora_A_general.to(torch.bfloat16)
        layer.gralora_B_general.to(torch.bfloat16)
    y = model(x)
    y.square().sum().backward()
    assert same_bits(y, expected)
    for name, grad in gradients(model).items():
        assert same_bits(grad, grads[name].to(grad.dtype)), name
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.1)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_frozen_modes_give_the_same_output() -> None:
    model, x = adapted("fused", gralora_dropout=0.5).eval(), rows(3)
    y = model(x)
    with torch.no_grad():
        assert same_bits(model(x), y.detach())
    with torch.inference_mode():
        assert torch.equal(model(x), y.detach())


@pytest.mark.parametrize("how", ["fused", "accelerated"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_fused_and_independent(duplicate: Any, how: str) -> None:
    model, x = adapted("fused" if how == "fused" else "stock", hybrid_r=2), rows(3)
    if how == "accelerated":
        accelerate(model)
    twin = duplicate(model)
    y = model(x)
    assert fused_layers(twin) == fused_layers(model) != [] and torch.equal(twin(x), y)
    with torch.no_grad():
        twin.base_model.model.first.gralora_B["default"].zero_()
    assert torch.equal(model(x), y) and not torch.equal(twin(x), y)


def test_saved_model_loads_in_a_process_that_has_not_imported_us(tmp_path: Path) -> None:
    model, x = adapted("fused", hybrid_r=2), rows(3)
    torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "model.pt")
    code = f"""
import sys, torch
saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
layer = saved["model"].base_model.model.first
print(type(layer).__module__, type(layer).__name__, torch.equal(saved["model"](saved["x"]), saved["y"]))
"""
    assert run_python(code).split() == ["gralora_ext.tuner.layer", "GraloraLinear", "True"]


def test_state_dict_of_a_fused_model_has_only_pefts_keys() -> None:
    layer = adapted("fused", Mlp, hybrid_r=2).base_model.model.first
    assert set(layer.state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        "gralora_A.default",
        "gralora_B.default",
        "gralora_A_general.default.weight",
        "gralora_B_general.default.weight",
    }
    assert not list(layer.buffers())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layer_compiles_without_a_graph_break(dropout: float) -> None:
    model, x = adapted("fused", hybrid_r=2, gralora_dropout=dropout), rows(5)
    compiled = torch.compile(model.base_model.model.first, fullgraph=True, backend="aot_eager")
    results = []
    for layer in (model.base_model.model.first, compiled):
        torch.manual_seed(4)
        model.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        results.append((y, [g.clone() for g in gradients(model).values()]))
    torch.compiler.reset()
    assert_same_output(results[1][0], results[0][0])
    for a, b in zip(results[1][1], results[0][1], strict=True):
        assert_same_output(a, b)


def test_trainable_bias_of_the_base_layer_gets_its_gradient() -> None:
    model = adapted("fused", bias="gralora_only")
    model(rows(3)).sum().backward()
    assert isinstance(model.base_model.model.first.bias, nn.Parameter)
    assert set(gradients(model)) >= {f"base_model.model.{name}.base_layer.bias" for name in ("first", "second")}
