# SPDX-License-Identifier: Apache-2.0
"""Where a layer is one operation with its frozen base layer, by whose GEMM, and where its base layer is called instead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from helpers import assert_near, same_bits
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from tuner_helpers import DEVICE, Conv1DMlp, Mlp, Single, adapted, gradients, llama, pair, rows, tokens

from gralora_ext import accelerate, restore
from gralora_ext._loader import load
from gralora_ext.tuner import GraloraLinear, frozen

FP32 = torch.float32
Around = Callable[[], AbstractContextManager[Any]]
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="for the CPU")


@pytest.fixture(autouse=True, params=[True, False], ids=["own GEMM", "torch's GEMM"])
def own_gemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The rule about speed out of the way: either way is right on every processor."""
    monkeypatch.setattr(frozen, "_IS_QUICKER", request.param)
    return request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one for every layer that is one operation: whether our GEMM multiplies."""
    found: list[bool] = []
    native = load()
    linear = native.linear
    monkeypatch.setattr(native, "linear", lambda *a: found.append(a[-1]) or linear(*a))
    return found


def trained_rows(*leading: int, dtype: torch.dtype = FP32) -> Tensor:
    return rows(*leading, dtype=dtype).requires_grad_()


def layer_of(model: PeftModel) -> GraloraLinear:
    return model.base_model.model.first


@pytest.mark.parametrize("k", [1, 2, 4, 12])
@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("base", [Mlp, Conv1DMlp])
def test_one_operation_has_the_output_and_the_gradients_of_pefts_layers(
    base: Any, hybrid_r: int, k: int, calls: list[bool], own_gemm: bool
) -> None:
    """PEFT's model in float64 from the same float32 values says what is right."""
    stock, fused = pair(base, FP32, gralora_k=k, hybrid_r=hybrid_r)
    stock.double()
    x = rows(5, 20, dtype=FP32)
    inputs = [x.double().requires_grad_(), x.clone().requires_grad_()]
    outputs = [model(x) for model, x in zip((stock, fused), inputs, strict=True)]
    for y in outputs:
        (y * rows(5, 20, width=12, seed=2, dtype=FP32)).sum().backward()
    assert calls == [own_gemm] * 2
    assert_near("y", outputs[1], outputs[0])
    assert_near("x", inputs[1].grad, inputs[0].grad, bound=1e-6)
    expected = gradients(stock)
    assert expected.keys() == gradients(fused).keys() and expected
    for name, gradient in gradients(fused).items():
        assert_near(name, gradient, expected[name], bound=1e-6)


@contextmanager
def precision(value: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Wide(Single):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(768, 768)


class MyParameter(nn.Parameter):
    """As those of libraries that shard or quantize."""


class MyLinear(nn.Linear):
    pass


@contextmanager
def patched_class() -> Iterator[None]:
    forward = nn.Linear.forward
    nn.Linear.forward = lambda self, x: forward(self, x)
    try:
        yield
    finally:
        nn.Linear.forward = forward


@contextmanager
def global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def replace_forward(layer: GraloraLinear) -> None:
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: forward(x)


def subclass_base(layer: GraloraLinear) -> None:
    layer.base_layer.__class__ = MyLinear


def subclass_weight(layer: GraloraLinear) -> None:
    layer.base_layer.weight = MyParameter(layer.base_layer.weight.detach(), requires_grad=False)


def add_second_adapter(layer: GraloraLinear) -> None:
    for name in (*layer.adapter_layer_names, *layer.other_param_names):  # update_layer() differs among PEFT's versions
        by_adapter = getattr(layer, name)
        by_adapter["other"] = copy.deepcopy(by_adapter["default"])
    layer.set_adapter(["default", "other"])


def tensors_for_parameters(layer: GraloraLinear) -> None:
    """As FSDP leaves a module while it computes."""
    for parameters in (layer.gralora_A, layer.gralora_B):
        tensor = parameters["default"].detach().clone()
        del parameters._parameters["default"]
        parameters.__dict__["default"] = tensor


# What must go through the base layer: (a change of the layer, what is around the call, the input)
THROUGH_THE_BASE: dict[str, tuple[Callable[[GraloraLinear], Any], Around, Tensor]] = {
    "few tokens": (lambda layer: None, nullcontext, rows(63, dtype=FP32)),
    "forward hook": (
        lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
        nullcontext,
        rows(70, dtype=FP32),
    ),
    "pre-hook": (
        lambda layer: layer.base_layer.register_forward_pre_hook(lambda *_: None),
        nullcontext,
        rows(70, dtype=FP32),
    ),
    "backward hook": (
        lambda layer: layer.base_layer.register_full_backward_hook(lambda *_: None),
        nullcontext,
        rows(70, dtype=FP32),
    ),
    "global hook": (lambda layer: None, global_hook, rows(70, dtype=FP32)),
    "forward of the instance": (replace_forward, nullcontext, rows(70, dtype=FP32)),
    "forward of the class": (lambda layer: None, patched_class, rows(70, dtype=FP32)),
    "subclass": (subclass_base, nullcontext, rows(70, dtype=FP32)),
    "parametrization": (
        lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", Doubled()),
        nullcontext,
        rows(70, dtype=FP32),
    ),
    "trained weight": (lambda layer: layer.base_layer.weight.requires_grad_(), nullcontext, rows(70, dtype=FP32)),
    "trained bias": (lambda layer: layer.base_layer.bias.requires_grad_(), nullcontext, rows(70, dtype=FP32)),
    "subclass of a parameter": (subclass_weight, nullcontext, rows(70, dtype=FP32)),
    "tensors for parameters": (tensors_for_parameters, nullcontext, rows(70, dtype=FP32)),
    "two adapters": (add_second_adapter, nullcontext, rows(70, dtype=FP32)),
    "merged": (lambda layer: layer.merge(), nullcontext, rows(70, dtype=FP32)),
    "autocast": (lambda layer: None, lambda: torch.autocast(DEVICE.type, torch.bfloat16), rows(70, dtype=FP32)),
    "switched off": (lambda layer: setattr(layer, "one_operation", False), nullcontext, rows(70, dtype=FP32)),
    "dispatch mode": (lambda layer: None, Looks, rows(70, dtype=FP32)),
}


def test_transforms_of_torch_func_need_the_base_layer() -> None:
    layer, x = layer_of(adapted("fused", dtype=FP32, target_modules=["first"])), trained_rows(70)
    asked = []

    def function(value: Tensor) -> Tensor:
        asked.append(frozen.how_to_multiply(layer, x))
        return value.sum()

    ones = torch.ones(2)
    torch.func.grad(function)(ones), torch.func.vmap(function)(ones), torch.func.jvp(function, (ones,), (ones,))
    assert asked == [None] * 3 and frozen.how_to_multiply(layer, x) is not None


# What our GEMM does not take: torch's is taken in training.
NOT_BY_OUR_GEMM: dict[str, tuple[Callable[[GraloraLinear], Any], Around, torch.dtype]] = {
    "bfloat16": (lambda layer: layer.base_layer.bfloat16(), nullcontext, torch.bfloat16),
    "float64": (lambda layer: layer.double(), nullcontext, torch.float64),
    "float64 adapter": (lambda layer: (layer.gralora_A.double(), layer.gralora_B.double()), nullcontext, FP32),
    "lower precision": (lambda layer: None, lambda: precision("medium"), FP32),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", THROUGH_THE_BASE)
def test_what_needs_the_base_layer_gets_it(name: str, training: bool, calls: list[bool]) -> None:
    change, around, x = THROUGH_THE_BASE[name]
    layer = layer_of(adapted("fused", dtype=FP32, target_modules=["first"]))
    change(layer)
    with around():
        layer(x.clone().requires_grad_(training))
    assert not calls


@pytest.mark.parametrize("name", NOT_BY_OUR_GEMM)
def test_what_our_gemm_does_not_take_is_torchs_to_multiply_in_training(name: str, calls: list[bool]) -> None:
    change, around, dtype = NOT_BY_OUR_GEMM[name]
    layer = layer_of(adapted("fused", dtype=FP32, target_modules=["first"]))
    change(layer)
    with around():
        layer(rows(70, dtype=dtype))
        assert not calls
        layer(trained_rows(70, dtype=dtype)).sum().backward()
    assert calls == [False]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_in_inference_the_base_layer_is_called_where_our_gemm_is_not_quicker(
    dropout: float, calls: list[bool], own_gemm: bool
) -> None:
    model = adapted("fused", dtype=FP32, target_modules=["first"], gralora_dropout=dropout)
    in_inference = [True] * 3 if own_gemm else []
    model(rows(70, dtype=FP32)), model.eval()(rows(70, dtype=FP32))
    with torch.no_grad():
        model(trained_rows(70))
    assert calls == in_inference
    model(trained_rows(70)), model.train()(trained_rows(70))
    assert calls == in_inference + [own_gemm] * 2


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_output_and_gradients_are_those_of_the_path_beside_the_base_layer(
    hybrid_r: int, dropout: float, dtype: torch.dtype, calls: list[bool], own_gemm: bool
) -> None:
    model = adapted("fused", dtype=dtype, gralora_dropout=dropout, hybrid_r=hybrid_r)
    got = []
    for one_operation in (False, True):
        for module in model.modules():
            if isinstance(module, GraloraLinear):
                module.one_operation = one_operation
        model.zero_grad()
        torch.manual_seed(3)
        x = trained_rows(70, dtype=dtype)
        y = model(x)
        (y * rows(70, width=12, seed=2, dtype=dtype)).sum().backward()
        got.append({"y": y.detach(), "x": x.grad, **{n: g.clone() for n, g in gradients(model).items()}})
    assert calls == [own_gemm and dtype == FP32] * 2 and len(got[0]) > 4
    for name, expected in got[0].items():
        if name == "y" and not any(calls):
            assert same_bits(got[1][name], expected)
        # dx of 16 bits is rounded twice, where autograd adds, three times
        assert_near(name, got[1][name], expected, bound={FP32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype])


def test_a_disabled_adapter_is_out_and_an_enabled_one_back(calls: list[bool]) -> None:
    model = adapted("fused", dtype=FP32, target_modules=["first"])
    x = trained_rows(70)
    with model.disable_adapter():
        base = model(x)
    assert not calls and same_bits(base, model.base_model.model.second(torch.relu(layer_of(model).base_layer(x))))
    assert not torch.allclose(model(x), base) and len(calls) == 1


def test_a_trained_weight_matters_only_where_gradients_are_recorded(calls: list[bool], own_gemm: bool) -> None:
    layer = layer_of(adapted("fused", dtype=FP32, target_modules=["first"]))
    layer.base_layer.weight.requires_grad_()
    with torch.no_grad():
        layer(rows(70, dtype=FP32))
    assert len(calls) == own_gemm


def test_a_large_rank_beside_few_tokens_does_not_pay(calls: list[bool], own_gemm: bool) -> None:
    """W + ΔW would take longer than what it saves."""
    model = adapted("fused", Wide, FP32, r=384, gralora_k=1, target_modules=["first"])
    for count in (383, 384):  # the path's share is 1
        model(rows(count, width=768, dtype=FP32).requires_grad_())
    assert calls == [False, own_gemm]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_bits(
    dropout: float, use_reentrant: bool, calls: list[bool], own_gemm: bool
) -> None:
    model = adapted("fused", dtype=FP32, gralora_dropout=dropout)
    results = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        torch.manual_seed(3)
        x = rows(70, dtype=FP32).requires_grad_()
        call(x).sum().backward()
        results.append({**{n: g.clone() for n, g in gradients(model).items()}, "x": x.grad})
    # the reentrant one calls the model without autograd first
    assert calls == ([own_gemm] * 6 if own_gemm or not use_reentrant else [False] * 4)
    assert all(same_bits(results[1][name], value) for name, value in results[0].items())


def test_a_language_model_trains_as_with_pefts_layers(calls: list[bool], own_gemm: bool) -> None:
    """Losses of five steps of AdamW, with PEFT's layers and with ours put in their place and out again."""
    losses = []
    batch = tokens(4, 32)
    for fused in (False, True):
        model = adapted("stock", llama, FP32, target_modules="all-linear", init_weights=True)
        if fused:
            assert accelerate(model).converted == 14
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        values = []
        for _ in range(5):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        losses.append(values)
        if fused:
            restore(model)
            model(input_ids=batch)
    # embeddings do not require a gradient, so the first q, k and v call their base layers unless
    # our GEMM takes them
    assert calls == [own_gemm] * (5 * (14 if own_gemm else 11))
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-4, atol=0)
    assert losses[0][-1] < losses[0][0]


def test_saved_tensors_may_leave_memory(calls: list[bool]) -> None:
    model = adapted("fused", dtype=FP32)
    results = []
    for around in (nullcontext(), torch.autograd.graph.save_on_cpu()):
        model.zero_grad()
        with around:
            y = model(trained_rows(70))
        y.sum().backward()
        results.append({n: g.clone() for n, g in gradients(model).items()})
    assert len(calls) == 4
    assert all(same_bits(results[1][name], value) for name, value in results[0].items())


def test_no_feature_and_no_dimension_are_torchs_to_refuse() -> None:
    layer = layer_of(adapted("fused", dtype=FP32, target_modules=["first"]))
    for x in (torch.zeros(70, 0), torch.tensor(1.0), torch.zeros(90, 23)):
        with pytest.raises((RuntimeError, ValueError)):
            layer(x.requires_grad_())
    assert layer(torch.zeros(0, 24, requires_grad=True)).shape == (0, 36)


def test_an_adapter_on_another_device_is_refused() -> None:
    model = adapted("fused", dtype=FP32, target_modules=["first"])
    layer = layer_of(model)
    layer.gralora_A["default"] = nn.Parameter(layer.gralora_A["default"].to("meta"))
    with pytest.raises(ValueError, match="the input is on cpu, but adapter 'default' is on meta"):
        model(rows(70, dtype=FP32))
