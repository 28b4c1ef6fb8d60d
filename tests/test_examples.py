# SPDX-License-Identifier: Apache-2.0
"""Each example runs to its end, on a tiny model, and trains fused layers."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from error_messages import ROOT
from peft import PeftConfig

import gralora_ext
from gralora_ext import GraloraLinear

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", ["peft_loop", "trainer", "sft"])
def test_example_trains_fused_layers_and_saves_the_adapter(name, tmp_path, monkeypatch):
    if name == "sft":
        pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", "--steps", "2", "--output", str(tmp_path)])
    try:
        left = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        gralora_ext.disable()
    model = left["trainer"].model if "trainer" in left else left["model"]
    layers = [module for module in model.modules() if isinstance(module, GraloraLinear)]
    if name != "peft_loop":  # which has merged its adapter
        assert len(layers) == 14
        assert all(layer.gralora_B["default"].any() for layer in layers)  # zero before the first step
    assert PeftConfig.from_pretrained(tmp_path / "adapter").peft_type.value == "GRALORA"
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_each_example_has_a_test():
    programs = {p.stem for p in EXAMPLES.glob("*.py")} - {"common"}
    assert programs == {"peft_loop", "trainer", "sft"}
