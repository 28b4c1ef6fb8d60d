# SPDX-License-Identifier: Apache-2.0
"""What LoRA has and GraLoRA does not have yet: ours says so, by name, before it builds anything."""

from __future__ import annotations

import torch
from feature_tuners import Tuner, delta, feature, layer, near
from peft import get_peft_model
from torch import Tensor, nn
from tuner_helpers import Mlp, llama, rows


class Experts(nn.Module):
    """Three experts, whose weights are one parameter ``[3, 12, 24]``; each sees every row."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 12, 24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.weights)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(24, 36)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x, x, x)[0]


def merged_is_the_same(tuner: Tuner, base: type[nn.Module], x: Tensor, **fields: object) -> None:
    """The adapter changes the output, and does so too when it is merged."""
    model = tuner.model(base, **{"target_modules": ["first"], **fields})
    y = model(x)
    with model.disable_adapter():
        assert (model(x) - y).norm() > 1e-3 * y.norm()
    near(model.merge_and_unload()(x), y)


@feature("experts (`target_parameters`)", later=True)
def _(tuner: Tuner) -> None:
    merged_is_the_same(tuner, Mixture, rows(3), target_modules=[], target_parameters=["first.weights"])


@feature("embeddings", later=True)
def _(tuner: Tuner) -> None:
    merged_is_the_same(tuner, Embedded, torch.arange(5))


@feature("convolutions", later=True)
def _(tuner: Tuner) -> None:
    merged_is_the_same(tuner, Convolved, rows(2, 8, 6, width=6))


@feature("`nn.MultiheadAttention` as one layer", later=True)
def _(tuner: Tuner) -> None:
    merged_is_the_same(tuner, Attending, rows(2, 5))


@feature("DoRA (`use_dora`)", later=True)
def _(tuner: Tuner) -> None:
    merged_is_the_same(tuner, Mlp, rows(3), use_dora=True)


@feature('starts from the weights (`init_weights="pissa"`)', later=True)
def _(tuner: Tuner) -> None:
    torch.manual_seed(0)
    base = Mlp()
    weight = base.first.weight.detach().clone()
    model = get_peft_model(base, tuner.config(init_weights="pissa"))
    held = weight - layer(model).get_base_layer().weight  # which the adapter has now
    assert held.norm() > 0.1 * weight.norm()
    near(held, delta(model), 1e-5)


@feature("layers that appear more than once in the forward (`layer_replication`)", later=True)
def _(tuner: Tuner) -> None:
    model = tuner.model(llama, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    assert len(model.base_model.model.model.layers) == 3
