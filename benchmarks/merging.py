"""The layers that are merged, all on one weight, what is timed of them, and the error of a merge."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gralora_ext import reference

from . import peers
from .accuracy import relative_error
from .data import Data
from .timing import Contender

ROWS = 16  # of each output block: what the error is taken on


def layers(data: Data) -> dict[str, nn.Module]:
    """Ours, PEFT's GraLoRA and PEFT's LoRA around layers that share a weight ``[M, N]`` in the activations' dtype."""
    s = data.shape
    weight = data.normal(s.M, s.N, dtype=s.x_dtype, scale=s.N**-0.5)
    return {
        "ours": peers.our_layer(data, peers.linear(weight)),
        "peft": peers.peft_layer(data, peers.linear(weight)),
        "lora": peers.lora_layer(data, peers.linear(weight), peers.lora_factors(data)),
    }


def merges(adapted: dict[str, nn.Module]) -> dict[str, Contender]:
    """Merging, with the layer unmerged before; PEFT's layers do nothing where they are merged already."""
    return {
        name: Contender(layer.merge, partial(_unless, layer, False, layer.unmerge)) for name, layer in adapted.items()
    }


def unmerges(adapted: dict[str, nn.Module]) -> dict[str, Contender]:
    """Unmerging, with the layer merged before."""
    return {
        name: Contender(layer.unmerge, partial(_unless, layer, True, layer.merge)) for name, layer in adapted.items()
    }


def _unless(layer: nn.Module, merged: bool, make: Callable[[], None]) -> None:
    if layer.merged != merged:
        make()


def merge_error(layer: nn.Module, data: Data) -> float:
    """``‖W' − (W + dW)‖ / ‖W + dW‖`` of a merge, on the first rows of each output block; unmerges again."""
    weight = layer.get_base_layer().weight
    if hasattr(layer, "lora_A"):
        operands = peers.lora_operands(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    else:
        operands = data.adapter
    wide = {name: tensor.detach().double() for name, tensor in operands.items()}
    k = wide["A"].shape[0]

    def rows(matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, (k, -1))[:, :ROWS].flatten(0, 1)

    wide["B"] = wide["B"][:, :, :ROWS]
    if "B_general" in wide:
        wide["B_general"] = rows(wide["B_general"])
    with torch.no_grad():
        expected = rows(weight).double() + reference.delta_weight(**wide, scaling=peers.SCALING)
        layer.merge()
        error = relative_error(rows(weight), expected)
        layer.unmerge()
    return error
