# SPDX-License-Identifier: Apache-2.0
"""The fused tuner model: PEFT's GraLoRA tuner, building fused layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners import gralora as stock
from peft.tuners.gralora.layer import Linear
from torch import nn

from .layer import GraloraLinear, refuse_adapter_names


class GraloraModel(stock.GraloraModel):
    """PEFT's :class:`peft.tuners.gralora.GraloraModel`, whose new layers are :class:`GraloraLinear`.

    Matching of target modules, initialization, state_dict keys and checkpoints are PEFT's own code, so the same seed and
    configuration give the same parameters. Installed for PEFT's GRALORA type by :func:`gralora_ext.tuner.enable`.
    """

    @staticmethod
    def _create_new_module(*args: Any, **kwargs: Any) -> nn.Module:
        # PEFT builds and initializes its layer, whatever its signature is in this release; only the
        # class changes.
        module = stock.GraloraModel._create_new_module(*args, **kwargs)
        if type(module) is Linear:
            module.__class__ = GraloraLinear
        return module

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PeftModel's forward and generate enter this and then drop adapter_names; without it they
        # are lost in silence.
        refuse_adapter_names(kwargs.get("adapter_names"))
        yield
