# SPDX-License-Identifier: Apache-2.0
"""What a run measures of its trained adapter beside the losses: the ranks of ΔW, and the gradient that it gives ΔW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..program.errors import JobError

GRID = 8  # ΔW's gradient is looked at in GRID x GRID blocks, whatever the adapter's own k
OF_OUTLIERS = "down_proj"  # whose input has the channels of greatest size
ROWS = 4  # of held-out data, in one batch


@dataclass(frozen=True)
class Adapted:
    """A layer's adapter in float64 and GraLoRA's layout; LoRA is k = 1."""

    name: str
    module: Any
    tensors: dict[str, Any]  # A, B, and where it is hybrid A_general and B_general
    scaling: float

    @property
    def most(self) -> int:
        """The rank that ΔW can have: k·r + h, and no more than the weight's sides."""
        A, B = self.tensors["A"], self.tensors["B"]
        k, n, r = A.shape
        h = self.tensors["A_general"].shape[0] if "A_general" in self.tensors else 0
        return min(k * r + h, k * n, k * B.shape[2])

    def delta(self) -> Tensor:
        """ΔW [M, N]."""
        return reference.delta_weight(**self.tensors, scaling=self.scaling)

    def directions(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The directions in which steps on A and on B move ΔW [M, N]: its derivatives along their gradients.

        For LoRA they are s² B Bᵀ G and s² G Aᵀ A with G = gᵀ x, the gradient that full fine-tuning
        has. A step on both moves ΔW along their sum.
        """
        leaves: dict[str, Any] = {name: t.clone().requires_grad_() for name, t in self.tensors.items()}
        y = reference.gralora(x, torch.zeros_like(g), **leaves, scaling=self.scaling)
        steps = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), g), strict=True))
        moved = [torch.zeros(g.shape[-1], x.shape[-1], dtype=torch.float64) for _ in "AB"]
        for pair in (("A", "B"), ("A_general", "B_general")):
            if pair[0] not in self.tensors:
                continue
            for direction, moving in zip(moved, pair, strict=True):
                factors = {n: (steps if n == moving else self.tensors)[n] for n in pair}
                direction += _product(factors, pair, self.tensors, self.scaling)
        return moved[0], moved[1]


def _product(factors: dict[str, Tensor], pair: tuple[str, str], tensors: dict[str, Tensor], scaling: float) -> Tensor:
    if pair == ("A", "B"):
        return reference.delta_weight(factors["A"], factors["B"], scaling=scaling)
    return scaling * factors["B_general"] @ factors["A_general"]


def adapted(model: Any, name: str = "default") -> Iterator[Adapted]:
    """The layers of ``model`` that have the adapter ``name``, in the model's order."""
    for path, module in model.named_modules():
        if name in getattr(module, "gralora_A", {}):
            tensors = {"A": module.gralora_A[name], "B": module.gralora_B[name]}
            if module.hybrid_r[name]:
                tensors["A_general"] = module.gralora_A_general[name].weight
                tensors["B_general"] = module.gralora_B_general[name].weight
        elif name in getattr(module, "lora_A", {}):
            tensors = {"A": module.lora_A[name].weight.T[None], "B": module.lora_B[name].weight.T[None]}
        else:
            continue
        wide = {key: t.detach().double().cpu().contiguous() for key, t in tensors.items()}
        yield Adapted(path, module, wide, module.scaling[name])


def of_blocks(layers: list[Adapted]) -> list[Adapted]:
    """Those of the first, the middle and the last block of the model: the layers of all blocks are alike in kind."""
    numbers = [int(next((part for part in layer.name.split(".") if part.isdecimal()), "0")) for layer in layers]
    wanted = {min(numbers), max(numbers) // 2, max(numbers)}
    return [layer for layer, number in zip(layers, numbers, strict=True) if number in wanted]


def ranks(job: Any) -> list[dict[str, Any]]:
    """Of some layers: the greatest rank that ΔW can have, and the measured one, see :func:`rank_of`."""
    return [
        {"layer": layer.name, "most": layer.most, **rank_of(layer.delta())}
        for layer in of_blocks([*adapted(job.model)])
    ]


def rank_of(delta: Tensor) -> dict[str, int]:
    """The number of singular values above max(M, N)·ε of the greatest, with ε of float64 and of float32."""
    values = torch.linalg.svdvals(delta.double())
    least = {str(d).split(".")[1]: max(delta.shape) * torch.finfo(d).eps for d in (torch.float64, torch.float32)}
    return {
        name: int((values > values.max() * factor).sum()) if values.max() > 0 else 0 for name, factor in least.items()
    }


def outliers(job: Any) -> list[dict[str, Any]]:
    """How far the gradient of ΔW is from full fine-tuning's, with the input's strongest channel and without it."""
    layers = [layer for layer in of_blocks([*adapted(job.model)]) if layer.name.endswith(OF_OUTLIERS)]
    if not layers:
        raise JobError(
            f"analyze outlier: no adapted layer of the model is named {OF_OUTLIERS}, whose inputs it looks at"
        )
    seen = _inputs_and_gradients(job, layers)
    return [{"layer": layer.name, **_with_and_without(layer, *seen[layer.name])} for layer in layers]


def _inputs_and_gradients(job: Any, layers: list[Adapted]) -> dict[str, tuple[Tensor, Tensor]]:
    """x [T, N] and g [T, M] of each layer in one batch of held-out rows, in float64; padding counts in x, and g is 0 there."""
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Tensor) -> None:
            inputs[name] = arguments[0].detach().double().cpu().flatten(0, -2)
            output.register_hook(lambda g: gradients.__setitem__(name, g.detach().double().cpu().flatten(0, -2)))

        return hook

    handles = [layer.module.register_forward_hook(watch(layer.name)) for layer in layers]
    device = next(job.model.parameters()).device
    batch = {key: t.to(device) for key, t in job.encoder.collate(job.batches.held_out[:ROWS]).items()}
    try:
        job.model.train()
        job.model(**batch, use_cache=False).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return {layer.name: (inputs[layer.name], gradients[layer.name]) for layer in layers}


def _with_and_without(layer: Adapted, x: Tensor, g: Tensor) -> dict[str, Any]:
    """``x`` as it is, and with its strongest channel at the median channel's size."""
    sizes = x.square().mean(0).sqrt()
    channel, median = int(sizes.argmax()), sizes.median().clamp_min(1e-30)
    plain = x.clone()
    plain[:, channel] *= median / sizes[channel]
    of_a, of_b = layer.directions(x, g)
    adapters = [of_a + of_b, torch.add(*layer.directions(plain, g))]
    full = [g.T @ inputs for inputs in (x, plain)]
    return {
        "channel": channel,
        "times_median": float(sizes[channel] / median),
        "block_column": channel * GRID // x.shape[1],
        "cosine_with": _cosine(adapters[0], full[0]),
        "cosine_without": _cosine(adapters[1], full[1]),
        "cosine_of_a": _cosine(of_a, full[0]),
        "cosine_of_b": _cosine(of_b, full[0]),
        "size_of_a": float(of_a.norm() / of_b.norm()) if of_b.norm() > 0 else 0.0,
        "block_cosines_with": _blocks(adapters[0], full[0], _cosine),
        "block_cosines_without": _blocks(adapters[1], full[1], _cosine),
        "change": _blocks(adapters[0], adapters[1], _change),
        "change_of_full": _blocks(full[0], full[1], _change),
    }


def _cosine(one: Tensor, other: Tensor) -> float:
    size = one.norm() * other.norm()
    return float((one * other).sum() / size) if size > 0 else 0.0


def _change(one: Tensor, other: Tensor) -> float:
    """How much the outlier changes: ‖with - without‖ / ‖without‖."""
    size = other.norm()
    return float((one - other).norm() / size) if size > 0 else 0.0


def _blocks(one: Tensor, other: Tensor, measure: Callable[[Tensor, Tensor], float]) -> list[list[float]]:
    """``measure`` of each of GRID x GRID blocks; a row of the list is a row of blocks, over outputs."""
    rows = zip(one.tensor_split(GRID, 0), other.tensor_split(GRID, 0), strict=True)
    return [
        [measure(a, b) for a, b in zip(one.tensor_split(GRID, 1), other.tensor_split(GRID, 1), strict=True)]
        for one, other in rows
    ]


EXTRAS: dict[str, Callable[[Any], list[dict[str, Any]]]] = {"ranks": ranks, "outliers": outliers}
