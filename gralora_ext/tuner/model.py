# SPDX-License-Identifier: Apache-2.0
"""The fused tuner model: PEFT's GraLoRA tuner, building fused layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners import gralora as stock
from peft.tuners.gralora.layer import Linear
from peft.tuners.lora import LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import repacking
from . import init, patterns, quantized
from .layer import GraloraLinear, refuse_adapter_names


class GraloraModel(stock.GraloraModel):
    """PEFT's :class:`peft.tuners.gralora.GraloraModel`, whose new layers are :class:`GraloraLinear`.

    Matching of target modules, initialization, state_dict keys and checkpoints are PEFT's own code, so the same seed and
    configuration give the same parameters. Installed for PEFT's GRALORA type by :func:`gralora_ext.tuner.enable`.
    """

    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> nn.Module:
        # PEFT builds and initializes its layer, whatever its signature is in this release; only the
        # class changes.
        target, *rest = args
        linear = quantized.stand_in(target)
        module = stock.GraloraModel._create_new_module(config, adapter_name, linear or target, *rest, **kwargs)
        if linear is not None:
            module.base_layer = target
        if type(module) is Linear:
            module.__class__ = GraloraLinear
            init.finish(module, adapter_name, config)
        return module

    def _create_and_replace(self, config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any) -> None:
        # PEFT's code makes the layer, from a configuration that says what this layer gets.
        own = patterns.of_layer(config, kwargs["current_key"], target)
        super()._create_and_replace(own, adapter_name, target, *args, **kwargs)
        config.fan_in_fan_out = own.fan_in_fan_out  # which PEFT sets by the class of the layer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        patterns.store_chosen_k(self.peft_config[adapter_name], adapter_name, model)
        quantized.prepare(model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if new_module is getattr(child, "base_layer", None) and not isinstance(new_module, (nn.Linear, Conv1D)):
            setattr(parent, child_name, new_module)  # a quantized layer; PEFT's code would write its weight
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        repacking.allow(model)
        return model

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        LoraModel._add_modules_to_save_to_tie(
            self, peft_config, tied_weight_keys
        )  # which touches the configuration alone

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PeftModel's forward and generate enter this and then drop adapter_names; without it they
        # are lost in silence.
        refuse_adapter_names(kwargs.get("adapter_names"))
        yield
