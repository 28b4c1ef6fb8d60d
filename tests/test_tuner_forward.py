# SPDX-License-Identifier: Apache-2.0
"""The fused layer computes what PEFT's layer computes, from the same parameters."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from helpers import NAMES, assert_near, same_bits
from peft.helpers import disable_input_dtype_casting
from peft.tuners.gralora.layer import Linear as StockLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tuner_helpers import (
    DEVICE,
    Conv1DMlp,
    Mlp,
    Single,
    adapted,
    assert_same_gradients,
    assert_same_output,
    config,
    fused_layers,
    gpt2,
    llama,
    pair,
    rows,
    stock_layers,
    tokens,
)

from gralora_ext import reference
from gralora_ext.tuner import GraloraConfig, GraloraLinear, GraloraModel, enable

BASES = [Mlp, Conv1DMlp]


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("base", [Mlp, Conv1DMlp, llama])
def test_same_seed_gives_pefts_parameters_and_state_dict(base: Any, hybrid_r: int, init_weights: bool) -> None:
    targets = "all-linear" if base is llama else ["first", "second"]
    stock, fused = pair(base, torch.float32, hybrid_r=hybrid_r, init_weights=init_weights, target_modules=targets)
    assert list(stock.state_dict()) == list(fused.state_dict())
    assert [(n, p.requires_grad) for n, p in stock.named_parameters()] == [
        (n, p.requires_grad) for n, p in fused.named_parameters()
    ]
    assert all(same_bits(a, b) for a, b in zip(stock.state_dict().values(), fused.state_dict().values(), strict=True))
    assert fused_layers(fused) == stock_layers(stock) != [] and not fused_layers(stock)


@pytest.mark.parametrize("leading", [(5,), (2, 5)])
@pytest.mark.parametrize("bias", ["none", "all", "gralora_only"])
@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 4, 12])
@pytest.mark.parametrize("base", BASES)
def test_output_and_gradients_are_pefts(base: Any, k: int, hybrid_r: int, bias: str, leading: tuple[int, ...]) -> None:
    models = pair(base, gralora_k=k, hybrid_r=hybrid_r, bias=bias)
    inputs = [rows(*leading).requires_grad_() for _ in models]
    outputs = [model(x) for model, x in zip(models, inputs, strict=True)]
    for y in outputs:
        (y * rows(*leading, width=12, seed=2)).sum().backward()
    assert_same_output(outputs[1], outputs[0])
    assert_same_output(inputs[1].grad, inputs[0].grad)
    assert_same_gradients(models[1], models[0])


@pytest.mark.parametrize("base", [llama, gpt2])
def test_language_model_agrees_with_peft(base: Any) -> None:
    stock, fused = pair(base, torch.float64, target_modules="all-linear", hybrid_r=2)
    batch = tokens(2, 9)
    results = [model(input_ids=batch, labels=batch) for model in (stock, fused)]
    for result in results:
        result.loss.backward()
    assert_same_output(results[1].logits, results[0].logits)
    assert_same_gradients(fused, stock)
    fused.eval(), stock.eval()
    assert torch.equal(
        *(model.generate(input_ids=batch, max_new_tokens=5, do_sample=False) for model in (stock, fused))
    )


@pytest.mark.parametrize("leading", [(), (1,), (2, 3, 4), (2, 1, 3, 2), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_input_may_have_any_rank_and_no_rows(base: Any, leading: tuple[int, ...]) -> None:
    model = adapted("fused", base, hybrid_r=3)
    x = rows(*leading).requires_grad_()
    y = model(x)
    y.sum().backward()
    assert y.shape == (*leading, 12) and x.grad.shape == x.shape
    assert same_bits(y.reshape(-1, 12), model(x.reshape(-1, 24)))


def test_strided_input_gives_what_its_copy_gives() -> None:
    model = adapted("fused")
    wide = rows(6, width=48)
    for x in (wide[:, ::2], wide[1:, 7:31], rows(24, width=6).T, rows(1).expand(6, 24)):
        assert_same_output(model(x), model(x.contiguous()))


@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_16_bit_base_keeps_float32_adapters_and_rounds_once_a_layer(dtype: torch.dtype, hybrid_r: int) -> None:
    stock, fused = pair(Single, dtype, hybrid_r=hybrid_r, target_modules=["first"])
    layer = fused.base_model.model.first
    assert {p.dtype for n, p in layer.named_parameters() if "gralora_" in n} == {torch.float32}
    x = rows(40, dtype=dtype)
    y, base = fused(x), layer.base_layer(x)
    assert y.dtype == stock(x).dtype == dtype
    expected = reference.gralora(x.double(), base.double(), **_wide_operands(layer))
    assert_near("y", y, expected)
    assert (y.double() - expected).norm() <= (stock(x).double() - expected).norm()


def _wide_operands(layer: GraloraLinear, adapter: str = "default") -> dict[str, Any]:
    """The layer's arguments for the reference, in float64."""
    operands = {"A": layer.gralora_A[adapter].double(), "B": layer.gralora_B[adapter].double()}
    if layer.hybrid_r[adapter]:
        operands["A_general"] = layer.gralora_A_general[adapter].weight.double()
        operands["B_general"] = layer.gralora_B_general[adapter].weight.double()
    return {**operands, "scaling": layer.scaling[adapter]}


def test_forward_is_the_base_layer_and_one_op_without_casts_or_copies() -> None:
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    layer, x = adapted("fused", dtype=torch.bfloat16, hybrid_r=3).base_model.model.first, rows(4, dtype=torch.bfloat16)
    with torch.no_grad(), Names():
        layer(x)
    assert seen == ["aten::t", "aten::addmm", "gralora_ext::gralora"]


def test_forward_adds_into_the_base_layers_output_unless_a_hook_may_have_kept_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = adapted("fused", hybrid_r=3).base_model.model.first, rows(4)
    outputs: list[torch.Tensor] = []
    expected, multiply = layer(x), nn.functional.linear
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda *args: outputs.append(multiply(*args)) or outputs[-1])
        assert layer(x).data_ptr() == outputs[0].data_ptr()
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    y = layer(x)
    handle.remove()
    assert y.data_ptr() != outputs[1].data_ptr()
    assert same_bits(outputs[1], layer.base_layer(x))
    assert same_bits(y, expected) and same_bits(outputs[0], expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("trained", [False, True])
def test_a_traced_layer_adds_its_adapter_to_other_inputs(trained: bool) -> None:
    """What a layer calls in eager mode leaves no trace: constants would be in their place."""
    layer = adapted("fused", hybrid_r=3, dtype=torch.float32).base_model.model.first
    example, other = (rows(80, seed=seed, dtype=torch.float32).requires_grad_(trained) for seed in (1, 2))
    traced = torch.jit.trace(layer, (example,))
    assert "gralora_ext::gralora(" in str(traced.graph)
    assert torch.allclose(traced(other), layer(other), rtol=1e-5, atol=1e-6)


def test_pefts_switch_for_input_casting_is_accepted() -> None:
    model, x = adapted("fused", dtype=torch.bfloat16), rows(4, dtype=torch.bfloat16)
    with disable_input_dtype_casting(model):
        assert same_bits(model(x), model(x.clone()))
    assert model.base_model.model.first.cast_input_dtype_enabled


def test_dropout_is_one_mask_for_both_parts_and_follows_the_mode_and_the_seed() -> None:
    model = adapted("fused", hybrid_r=3, gralora_dropout=0.4)
    layer, x = model.base_model.model.first, rows(50)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    seed = reference.draw_seed(DEVICE)
    assert_same_output(y, reference.gralora(x, layer.base_layer(x), **_wide_operands(layer), dropout_p=0.4, seed=seed))
    assert not torch.equal(y, layer(x)), "a second call has to draw another mask"
    model.eval()
    assert_same_output(layer(x), reference.gralora(x, layer.base_layer(x), **_wide_operands(layer)))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_targets_are_chosen_as_peft_does(fields: dict[str, Any]) -> None:
    stock, fused = pair(llama, torch.float32, **fields)
    assert fused_layers(fused) == stock_layers(stock) != []
    assert list(stock.state_dict()) == list(fused.state_dict())


def test_config_and_classes_extend_pefts() -> None:
    model = adapted("fused")
    layer = model.base_model.model.first
    assert issubclass(GraloraConfig, peft.GraloraConfig)
    assert type(model.base_model) is GraloraModel and issubclass(GraloraModel, peft.GraloraModel)
    assert type(layer) is GraloraLinear and isinstance(layer, StockLinear)


@pytest.mark.parametrize("width", [36, 24], ids=["first", "second"])
def test_width_that_k_does_not_divide_is_refused_as_by_peft(width: int) -> None:
    with enable(), pytest.raises(ValueError, match="divisible by gralora_k"):
        peft.get_peft_model(
            nn.Sequential(nn.Linear(width, 60 - width)), config(target_modules=["0"], r=10, gralora_k=5)
        )


def test_wrong_inputs_and_unloaded_adapters_give_an_error() -> None:
    layer = adapted("fused", dtype=torch.float32).base_model.model.first
    with pytest.raises(RuntimeError, match="shape"):  # torch's own, from the base layer
        layer(torch.zeros(3, 23, device=DEVICE))
    with enable():
        model = peft.get_peft_model(Mlp(), config(), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="input is on cpu, but adapter 'default' is on meta"):
        model(torch.zeros(3, 24))
    assert model.to_empty(device="meta")(torch.zeros(3, 24, device="meta")).shape == (3, 12)


class Relu(nn.Linear):
    """A base layer with a forward of its own, which keeps its output for backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias).relu()


class Remembers(nn.Linear):
    """One that gives back what it gave before."""

    output: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.output is None:
            self.output = super().forward(x)
        return self.output


@pytest.mark.parametrize("kind", [Relu, Remembers])
def test_the_output_of_a_layer_with_a_forward_of_its_own_stays(kind: type[nn.Linear]) -> None:
    class Model(Single):
        def __init__(self) -> None:
            super().__init__()
            self.first = kind(24, 36)

    model, x = adapted("fused", Model, target_modules=["first"]), rows(5)
    y = model(x)
    y.sum().backward()
    with model.disable_adapter():
        base = model(x).detach().clone()
    assert not same_bits(y.detach(), base)
    assert same_bits(model(x), y), "the second time as the first"


def test_the_output_of_a_patched_forward_stays() -> None:
    model, x, kept = adapted("fused", Single, target_modules=["first"]), rows(5), []
    base = model.base_model.model.first.base_layer
    base.forward = lambda x: kept.append(nn.Linear.forward(base, x)) or kept[-1]
    y = model(x)
    assert same_bits(kept[0], nn.Linear.forward(base, x)) and not same_bits(kept[0], y)


@pytest.mark.parametrize("how", ["disabled", "merged"])
def test_without_an_adapter_the_output_is_that_of_the_base_layer(how: str) -> None:
    class Wide(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).float()

    class Model(Single):
        def __init__(self) -> None:
            super().__init__()
            self.first = Wide(24, 36)

    model, x = adapted("fused", Model, torch.bfloat16, target_modules=["first"]), rows(5, dtype=torch.bfloat16)
    if how == "merged":
        model.merge_adapter()
        assert model(x).dtype == torch.float32
    else:
        with model.disable_adapter():
            assert model(x).dtype == torch.float32
