# SPDX-License-Identifier: Apache-2.0
"""The configuration: what is refused, by name, and of what there is a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from config_helpers import FIELDS, USED, built, layers
from peft import LoraConfig, PeftModel, get_peft_model
from tuner_helpers import Mlp, needs_new_peft

from gralora_ext import GraloraConfig
from gralora_ext.tuner import accelerate, disable, enable

pytestmark = needs_new_peft


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    with enable():
        yield


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_weights": "pissa"}, "init_weights: expected True, False, 'gaussian' or 'orthogonal', got 'pissa'"),
        ({"gralora_k": "many"}, "gralora_k: expected a positive integer or 'auto', got 'many'"),
        ({"gralora_k": 0}, "gralora_k: expected a positive integer or 'auto', got 0"),
        ({"rank_pattern": {"first": 0}}, "rank_pattern: expected a positive integer for 'first', got 0"),
        ({"k_pattern": {"first": 2.0}}, "k_pattern: expected a positive integer for 'first', got 2.0"),
        ({"alpha_pattern": {"first": "8"}}, "alpha_pattern: expected a positive number for 'first', got '8'"),
        ({"rank_pattern": ["first"]}, "rank_pattern: expected a dict from names of layers to numbers"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: '(' is no name and no regular expression"),
        ({"use_dora": True}, "use_dora is a field of LoraConfig, and GraLoRA has nothing like it"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is a field of LoraConfig, and GraLoRA"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is a field of LoraConfig, and GraLoRA"),
        ({"target_parameters": ["w"]}, "target_parameters is a field of LoraConfig, and GraLoRA"),
        ({"lora_alpha": 8}, "lora_alpha is a field of LoraConfig: here it is 'alpha'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nothing_is_taken_and_ignored(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        GraloraConfig(**{**FIELDS, **fields})
    assert str(raised.value).startswith(message)


def test_every_field_of_loras_that_gralora_lacks_is_refused_by_name() -> None:
    default = LoraConfig()
    for name in set(vars(default)) - set(vars(GraloraConfig())):
        if not name.startswith("_") and name in LoraConfig.__dataclass_fields__:
            with pytest.raises(ValueError, match=f"^{name} is a field of LoraConfig"):
                GraloraConfig(**{name: "something"})


MISREAD = ["rank_pattern", "alpha_pattern", "k_pattern", "use_rslora", "trainable_token_indices", "init_weights"]


@pytest.mark.parametrize("field", MISREAD)
@pytest.mark.parametrize("how", ["built", "added", "loaded"])
def test_pefts_own_tuner_refuses_what_it_would_misread(field: str, how: str, tmp_path: Path) -> None:
    """Though ``enable()`` was called when the configuration was made, or since the model was."""
    config = GraloraConfig(**{**FIELDS, field: USED[field]})
    with pytest.raises(ValueError, match=f"{field}: this model was built by PEFT's own tuner, which would ignore"):
        if how == "built":
            disable()
            get_peft_model(Mlp().double(), config)
        disable()
        model = get_peft_model(Mlp().double(), peft.GraloraConfig(**FIELDS))
        with enable():
            if how == "added":
                model.add_adapter("b", config)
            config.save_pretrained(tmp_path)
            model.load_adapter(str(tmp_path), "b")


def test_a_model_of_pefts_tuner_takes_the_fields_once_it_is_accelerated() -> None:
    disable()
    model = get_peft_model(Mlp().double(), peft.GraloraConfig(**FIELDS))
    with enable():
        accelerate(model)
        model.add_adapter("b", GraloraConfig(**{**FIELDS, "use_rslora": True}))
        assert all(layer.scaling["b"] == 24 / 12**0.5 for layer in layers(model).values())


def test_our_tuner_gives_the_fields_to_layers_of_pefts_too() -> None:
    """Of layers that accelerate() skips: their adapters get what the configuration says."""
    disable()
    model = get_peft_model(Mlp().double(), peft.GraloraConfig(**FIELDS))
    model.base_model.model.first.gralora_dropout["default"] = torch.nn.AlphaDropout(0.1)
    with enable():
        assert accelerate(model).converted == 1
        model.add_adapter("b", GraloraConfig(**{**FIELDS, "use_rslora": True, "init_weights": "gaussian"}))
    for layer in layers(model).values():
        assert layer.scaling["b"] == 24 / 12**0.5 and not layer.gralora_B["b"].any()
        assert 0.5 < float(layer.gralora_A["b"].std() * 12) < 1.5
    assert model.base_model.model.first.scaling["default"] == 2.0


def test_a_subclass_has_the_fields_of_its_class() -> None:
    class Mine(GraloraConfig):
        pass

    assert Mine(r=8, use_rslora=True).use_rslora
    with pytest.raises(ValueError, match="use_dora is a field of LoraConfig"):
        Mine(use_dora=True)


def test_pefts_own_class_cannot_name_a_beginning_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="init_weights: expected True, False, 'gaussian' or 'orthogonal', got 'pissa'"):
        built(config=peft.GraloraConfig, init_weights="pissa")


def test_a_layer_whose_r_its_k_does_not_divide_is_named() -> None:
    with pytest.raises(
        ValueError, match="second: r must be divisible by gralora_k, but r is 9 and gralora_k is 2 there"
    ):
        built(rank_pattern={"second": 9})


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "k_pattern"])
@pytest.mark.parametrize("k", [2, "auto"])
def test_keys_that_match_no_layer_are_warned_of(field: str, k: Any) -> None:
    message = rf"The following {field} keys did not match any targeted module and were ignored: \['frist', 'third'\]"
    with pytest.warns(RuntimeWarning, match=message):
        built(gralora_k=k, **{field: {"third": 4, "first": 4, "frist": 4}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = built(gralora_k=k, **{field: {"first|second": 4}})
        model.add_adapter("other", GraloraConfig(**{**FIELDS, "target_modules": ["first"]}))
    with pytest.warns(RuntimeWarning, match=f"{field} keys .*'second'"):
        model.add_adapter("third", GraloraConfig(**{**FIELDS, "target_modules": ["first"], field: {"second": 4}}))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "k_pattern"])
def test_patterns_whose_order_matters_are_refused_since_a_file_does_not_keep_it(field: str, tmp_path: Path) -> None:
    message = f"^{field}: 'first' and '.\\*irst' both match first, with different values, and the file of the adapter"
    with pytest.raises(ValueError, match=message):
        built(**{field: {"first": 4, ".*irst": 2}})
    for pattern in ({"first": 4, ".*irst": 4}, {".*irst": 4, "first": 2}, {"second": 4, "[a-r].*": 2}):
        model = built(**{field: pattern})
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(Mlp().double(), tmp_path)
        for name, layer in layers(model).items():
            loaded = layers(again)[name]
            assert (layer.r, layer.alpha, layer.gralora_k) == (loaded.r, loaded.alpha, loaded.gralora_k)


def test_fields_that_stock_peft_would_ignore_need_enable(tmp_path: Path) -> None:
    GraloraConfig(**FIELDS, use_rslora=True).save_pretrained(tmp_path)
    disable()
    for make in (lambda: GraloraConfig(**FIELDS, use_rslora=True), lambda: GraloraConfig.from_pretrained(tmp_path)):
        with pytest.raises((RuntimeError, TypeError)):
            make()
    with pytest.raises(
        RuntimeError, match=r"use_rslora: PEFT's own tuner would ignore this field: call gralora_ext.enable"
    ):
        GraloraConfig(**FIELDS, use_rslora=True)
    assert GraloraConfig(**FIELDS).gralora_k == 2


def test_fields_need_a_peft_that_knows_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(RuntimeError, match="use_rslora: this field needs peft 0.21.0 or newer, found 0.20.0"):
        GraloraConfig(**FIELDS, use_rslora=True)
    assert GraloraConfig(**FIELDS).r == 12
