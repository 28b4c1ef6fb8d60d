# SPDX-License-Identifier: Apache-2.0
"""Features as functions of a tuner, and the tuners that they are tried with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from tuner_helpers import Mlp, llama, rows, tokens

import gralora_ext


@dataclass(frozen=True)
class Feature:
    """``try_it`` tries it on a small model and checks its numbers; without the feature it fails."""

    try_it: Callable[[Tuner], None]
    needs: str = ""  # a package
    later: bool = False  # ours refuses it today
    processor: str = ""  # an instruction set, as /proc/cpuinfo names it, with which the tuners differ

    @property
    def can_be_tried(self) -> bool:
        return not self.needs or find_spec(self.needs) is not None

    @property
    def tells_them_apart(self) -> bool:
        """Whether what is tried here is what the page says."""
        return self.can_be_tried and (not self.processor or self.processor in Path("/proc/cpuinfo").read_text("utf-8"))


FEATURES: dict[str, Feature] = {}  # by title, in the order in which they are registered


@dataclass(frozen=True)
class Tuner:
    """One of three: PEFT's LoRA, PEFT's GraLoRA, and ours."""

    title: str
    is_lora: bool = False
    is_ours: bool = False

    def config(self, **fields: Any) -> Any:
        """Of rank 8 and alpha 16, on the layers of ``Mlp``; the adapter begins at random."""
        if self.is_lora:
            names = {"init_weights": "init_lora_weights", "alpha": "lora_alpha", "dropout": "lora_dropout"}
            kind = peft.LoraConfig
        else:
            names = {"dropout": "gralora_dropout"}
            kind = gralora_ext.GraloraConfig if self.is_ours else peft.GraloraConfig
        values = {"r": 8, "alpha": 16, "target_modules": ["first", "second"], "init_weights": False, **fields}
        return kind(**{names.get(name, name): value for name, value in values.items()})

    def model(self, base: Any = Mlp, **fields: Any) -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(base().double(), self.config(**fields)).double().eval()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with gralora_ext.enable() if self.is_ours else nullcontext():
            yield


TUNERS = [Tuner("LoRA", is_lora=True), Tuner("PEFT's GraLoRA"), Tuner("gralora_ext", is_ours=True)]


def feature(
    title: str, *, needs: str = "", later: bool = False, processor: str = ""
) -> Callable[[Callable[[Tuner], None]], Callable[[Tuner], None]]:
    """Registers a function as the :class:`Feature` of this title."""

    def register(function: Callable[[Tuner], None]) -> Callable[[Tuner], None]:
        FEATURES[title] = Feature(function, needs, later, processor)
        return function

    return register


def layer(model: PeftModel, name: str = "first") -> Any:
    found = model.base_model.model.get_submodule(name)
    assert isinstance(found, BaseTunerLayer), f"{name} has no adapter"
    return found


def delta(model: PeftModel, name: str = "first", adapter: str = "default") -> Tensor:
    return layer(model, name).get_delta_weight(adapter).detach().clone()


def near(actual: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound)


def output_is_base_plus(model: PeftModel, change: Tensor, name: str = "first") -> None:
    x = rows(5, width=change.shape[1])
    near(layer(model, name)(x), layer(model, name).get_base_layer()(x) + x @ change.T)


def saved_and_loaded(model: PeftModel, base: Any) -> PeftModel:
    """The model again from its files, with the same outputs."""
    x = tokens(2, 6) if base is llama else rows(4)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(base().double(), folder).double().eval()
    y, expected = again(x), model(x)
    near(y.logits if base is llama else y, expected.logits if base is llama else expected)
    return again
