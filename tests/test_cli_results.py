# SPDX-License-Identifier: Apache-2.0
"""The merged model is proved equal to adapter + base: a merge that went wrong is told, in either dtype."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import make_model
from peft import GraloraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gralora_ext.cli.model import DTYPES
from gralora_ext.cli.results import MERGED_TOLERANCE, write_merged
from gralora_ext.program.errors import JobError
from gralora_ext.tuner import GraloraLinear, enable

MISSED = "model.layers.1.self_attn.v_proj"
dtypes = pytest.mark.parametrize("dtype", ["fp32", "bf16"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("results") / "model")


def trained(base: Path, dtype: str, ours: bool = True, scale: float = 0.03) -> Any:
    """``base`` with an adapter on every layer, whose ΔW is about so large beside each weight."""
    with enable() if ours else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype])
        config = GraloraConfig(r=4, alpha=4, gralora_k=2, target_modules="all-linear", init_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(model, config)
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight"):
            by = scale * layer.get_base_layer().weight.norm() / layer.get_delta_weight("default").norm()
            layer.gralora_B["default"].data *= by
    return model


def merge(model: Any, base: Path, dtype: str, folder: Path) -> dict[str, float]:
    ids = torch.randint(2, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return write_merged(model, AutoTokenizer.from_pretrained(base), batch, dtype, folder)


@dtypes
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "peft"])
@pytest.mark.parametrize("scale", [0.001, 0.03, 1.0])
def test_a_merge_is_right(scale: float, ours: bool, dtype: str, base: Path, tmp_path: Path) -> None:
    """Whatever the adapter has learned: in bfloat16 most of a small one is less than a weight's rounding."""
    found = merge(trained(base, dtype, ours, scale), base, dtype, tmp_path)
    assert 0 <= found["relative"] <= MERGED_TOLERANCE[dtype]
    assert found["max_difference"] <= found["max_logit"]


def scaled(by: float, only: str = "") -> Callable[[Any], None]:
    """A merge that adds the adapters' weights by ``by``, of all layers or of one."""

    def plant(model: Any, patch: pytest.MonkeyPatch) -> None:
        right = GraloraLinear.merge
        wrong = [layer for name, layer in model.get_base_model().named_modules() if not only or name == only]

        def merge(self: Any, *args: Any, **kwargs: Any) -> None:
            scalings = dict(self.scaling)
            if any(self is layer for layer in wrong):
                self.scale_layer(by)
            right(self, *args, **kwargs)
            self.scaling.update(scalings)

        patch.setattr(GraloraLinear, "merge", merge)

    return plant


def block_left_out(model: Any, patch: pytest.MonkeyPatch) -> None:
    """One input block of one layer."""
    right = GraloraLinear.merge
    layer = model.get_base_model().get_submodule(MISSED)

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        weight = self.get_base_layer().weight
        before = weight.detach().clone()
        right(self, *args, **kwargs)
        if self is layer:
            weight.data[:, weight.shape[1] // 2 :] = before[:, weight.shape[1] // 2 :]

    patch.setattr(GraloraLinear, "merge", merge)


@dtypes
@pytest.mark.parametrize(
    "plant",
    [scaled(-1.0), scaled(2.0), scaled(0.0), scaled(0.0, MISSED), scaled(-1.0, MISSED), block_left_out],
    ids=["wrong sign", "twice", "not at all", "a layer missing", "a layer's sign", "a block missing"],
)
def test_a_wrong_merge_is_told(
    plant: Callable[[Any, pytest.MonkeyPatch], None],
    dtype: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trained(base, dtype)
    plant(model, monkeypatch)
    with pytest.raises(JobError, match=r"merged .* --no-merge writes the adapter without the merged model"):
        merge(model, base, dtype, tmp_path)
