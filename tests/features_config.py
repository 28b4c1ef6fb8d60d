# SPDX-License-Identifier: Apache-2.0
"""What LoRA's configuration says."""

from __future__ import annotations

import torch
from feature_tuners import Tuner, delta, feature, layer, near, saved_and_loaded
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tuner_helpers import Mlp, llama, tokens


@feature("`rank_pattern`")
def _(tuner: Tuner) -> None:
    model = tuner.model(rank_pattern={"second": 4})
    sizes = {
        n: sum(p.numel() for q, p in layer(model, n).named_parameters() if "base_layer" not in q)
        for n in ("first", "second")
    }
    assert sizes == {"first": 8 * (24 + 36), "second": 4 * (36 + 12)}


@feature("`alpha_pattern`")
def _(tuner: Tuner) -> None:
    near(delta(tuner.model(alpha_pattern={"first": 48})), 3 * delta(tuner.model()))


@feature("`use_rslora`")
def _(tuner: Tuner) -> None:
    near(delta(tuner.model(use_rslora=True)), 8**0.5 * delta(tuner.model()))


@feature("`exclude_modules`")
def _(tuner: Tuner) -> None:
    assert not isinstance(tuner.model(exclude_modules=["second"]).base_model.model.second, BaseTunerLayer)


@feature("`trainable_token_indices`")
def _(tuner: Tuner) -> None:
    model = tuner.model(llama, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "token" in name]
    assert len(trained) == 1
    before = model(tokens(2, 6)).logits
    with torch.no_grad():
        model.get_parameter(trained[0]).add_(1.0)
    assert not torch.equal(model(torch.tensor([[3, 4]])).logits, before[:1, :2])
    saved_and_loaded(model, llama)


@feature("`ensure_weight_tying`")
def _(tuner: Tuner) -> None:
    def tied() -> nn.Module:
        model = llama()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    model = tuner.model(tied, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    inner = model.base_model.model
    assert inner.lm_head.weight.data_ptr() == inner.model.embed_tokens.weight.data_ptr()


@feature('`init_weights="gaussian"`')
def _(tuner: Tuner) -> None:
    first = layer(tuner.model(init_weights="gaussian"))
    A = first.lora_A["default"].weight if tuner.is_lora else first.gralora_A["default"]
    assert abs(A.std().item() * 8 - 1) < 0.25 and not delta(tuner.model(init_weights="gaussian")).any()


@feature('`init_weights="orthogonal"`')
def _(tuner: Tuner) -> None:
    model = tuner.model(init_weights="orthogonal")
    B = layer(model).lora_B["default"].weight if tuner.is_lora else layer(model).gralora_B["default"]
    assert B.any() and delta(model).abs().max() < 1e-6


@feature("`modules_to_save`")
def _(tuner: Tuner) -> None:
    model = tuner.model(target_modules=["first"], modules_to_save=["second"])
    with torch.no_grad():
        model.base_model.model.second.modules_to_save["default"].weight.add_(1.0)
    saved_and_loaded(model, Mlp)


@feature("`layers_to_transform`")
def _(tuner: Tuner) -> None:
    model = tuner.model(llama, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert [isinstance(each.self_attn.q_proj, BaseTunerLayer) for each in model.base_model.model.model.layers] == [
        False,
        True,
    ]


@feature("a name that is no way to begin is refused")
def _(tuner: Tuner) -> None:
    try:
        tuner.model(init_weights="no such way")
    except ValueError:
        return
    raise AssertionError("it was taken and ignored")
