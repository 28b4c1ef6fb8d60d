# SPDX-License-Identifier: Apache-2.0
"""One adapter for each row of a batch: each row as if it had been alone, with PEFT's LoRA as the model of what is asked."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration
from tuner_helpers import DEVICE, adapted, config, llama, needs_new_peft, rows, tokens

from gralora_ext.tuner import enable
from gralora_ext.tuner.mixed_batch import order_of

pytestmark = needs_new_peft
ADAPTERS = ("default", "second", "third")


def with_adapters(base: Any = llama, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    targets = {"target_modules": ["q_proj", "down_proj"]} if base is llama else {}
    model = adapted("fused", base, dtype, **{**targets, **fields})
    with enable():
        model.add_adapter("second", config(**{**targets, "r": 4, "hybrid_r": 3}))
        model.add_adapter(
            "third",
            config(**{**targets, "gralora_k": 4, "target_modules": targets.get("target_modules", ["first"])[:1]}),
        )
    return model.to(dtype).to(DEVICE).eval()


def alone(model: Any, name: str, **batch: torch.Tensor) -> torch.Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(**batch).logits
    model.set_adapter(name)
    return model(**batch).logits


NAMES = ["third", "default", "__base__", "second", "default", "third"]


@pytest.mark.parametrize(
    "names", [NAMES, sorted(NAMES), ["second"] * 6, ["__base__"] * 6], ids=["mixed", "sorted", "one", "base"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_is_that_of_its_own_adapter(dtype: torch.dtype, names: list[str]) -> None:
    model, batch = with_adapters(dtype=dtype), tokens(6, 7)
    y = model(input_ids=batch, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = alone(model, name, input_ids=batch[row : row + 1])
        torch.testing.assert_close(y[row : row + 1], expected, rtol=1e-5, atol=1e-5)


@given(names=st.lists(st.sampled_from([*ADAPTERS, "__base__"]), max_size=9))
@settings(max_examples=60, deadline=None)
def test_an_order_has_each_row_once_and_each_adapter_once(names: list[str]) -> None:
    order = order_of(tuple(names))
    rows_of = list(range(len(names))) if order.rows is None else order.rows
    assert sorted(rows_of) == list(range(len(names)))
    assert len({group.adapter for group in order.groups}) == len(order.groups)
    assert [names[row] for row in rows_of] == [g.adapter for g in order.groups for _ in range(g.last - g.first)]
    if order.back is not None:
        assert [rows_of[place] for place in order.back] == list(range(len(names)))


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_each_row_alone(beams: int) -> None:
    model, batch, names = with_adapters(dtype=torch.float64), tokens(4, 5), ["second", "__base__", "default", "second"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(input_ids=batch, adapter_names=names, **options)
    for row, name in enumerate(names):
        one = model.generate(input_ids=batch[row : row + 1], adapter_names=[name], **options)
        assert torch.equal(together[row : row + 1], one)


def test_beams_repeat_the_names_in_the_decoder_alone() -> None:
    def t5() -> Any:
        size = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0))

    torch.manual_seed(0)
    with enable():
        model = get_peft_model(t5(), config(target_modules=["q", "v"], r=8)).double().to(DEVICE).eval()
        model.add_adapter("second", config(target_modules=["q", "v"], r=4))
    model.double()
    batch, names = tokens(2, 6) % 40, ["second", "default"]
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    together = model.generate(input_ids=batch, adapter_names=names, **options)
    for row, name in enumerate(names):
        one = model.generate(input_ids=batch[row : row + 1], adapter_names=[name], **options)
        assert torch.equal(together[row, : one.shape[1]], one[0])


def test_gradients_reach_each_adapter_through_its_own_rows() -> None:
    model, batch = with_adapters(dtype=torch.float64), tokens(3, 5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gralora_" in name)
    model(input_ids=batch, adapter_names=["default", "second", "default"]).logits.sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("default" in name for name in got) and any("second" in name for name in got)
    assert not any("third" in name for name in got)
    model.zero_grad()
    alone(model, "second", input_ids=batch[1:2]).sum().backward()
    for name, parameter in model.named_parameters():
        if "second" in name and parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_the_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model, batch = with_adapters(), tokens(2, 5)
    before = model(input_ids=batch).logits
    with pytest.raises(ValueError, match="expected a name for each of 2 rows, got 3"):
        model(input_ids=batch, adapter_names=["default"] * 3)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(input_ids=batch).logits, before)
    assert torch.equal(model(input_ids=batch, adapter_names=None).logits, before)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["default", "none"], ValueError, "there is no adapter none: the model has default, second, third"),
        ("default", TypeError, "expected a list of names, one for each row, got 'default'"),
        (["default", 1], TypeError, "expected a list of names, one for each row"),
    ],
)
def test_wrong_names_are_refused(names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        with_adapters()(input_ids=tokens(2, 4), adapter_names=names)


def test_training_and_merged_adapters_are_refused_as_by_lora() -> None:
    model, batch = with_adapters(), tokens(1, 4)
    with pytest.raises(ValueError, match=r"expected a model in evaluation mode.*model\.eval"):
        model.train()(input_ids=batch, adapter_names=["default"])
    model.eval().merge_adapter(["default"])
    with pytest.raises(ValueError, match=r"holds merged adapters \(default\): call unmerge_adapter"):
        model(input_ids=batch, adapter_names=["second"])
    torch.manual_seed(0)
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).train()
    with pytest.raises(ValueError):
        lora(input_ids=batch, adapter_names=["default"])


def test_an_old_peft_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters()
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(RuntimeError, match="mixed batches need peft 0.21.0 or newer, found 0.20.0"):
        model(input_ids=tokens(1, 4), adapter_names=["default"])


def test_a_layer_takes_names_by_itself() -> None:
    layer = adapted("fused", dtype=torch.float64).base_model.model.first
    x = rows(3, 4)
    y = layer(x, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(y[[0, 2]], layer(x[[0, 2]]))
    assert torch.equal(y[1], layer.base_layer(x)[1])


def test_a_row_whose_adapter_has_no_copy_of_a_module_gets_the_models_own() -> None:
    """Of modules_to_save, which one adapter has and the other one has not."""
    model = adapted("fused", target_modules=["first"], modules_to_save=["second"]).eval()
    with enable():
        model.add_adapter("other", config(target_modules=["first"]))
    with torch.no_grad():
        model.base_model.model.second.modules_to_save["default"].weight.mul_(2)
    x, expected = rows(2), []
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append(model(x))
    model.set_adapter("default")
    y = model(x, adapter_names=["default", "other"])
    torch.testing.assert_close(y, torch.stack([expected[0][0], expected[1][1]]))
