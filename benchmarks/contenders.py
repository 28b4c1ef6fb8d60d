# SPDX-License-Identifier: Apache-2.0
"""The contenders, the tensors that they all get, and their error against :mod:`gralora_ext.reference` in float64.

The same adapter path by our layer, our operation, PEFT's GraLoRA and LoRA, and plain torch; and
whole layers, to be merged.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import GraloraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import gralora_ext
from gralora_ext import reference

from . import plain_torch
from .bench import Skip
from .shapes import Shape
from .timing import Contender

SEED = 0
SCALING = 1.0
TOKENS = 64  # that an error is taken on; with the gradient of y zero beyond them, all results are those of these

Call = Callable[[Tensor, Tensor], Tensor]


class Data:
    """``x``, ``base``, ``grad`` (the gradient of y) and the adapter, with the adapter's share of y as large as base's.

    All contenders add into the one ``base``, as into the output of a base layer. Its values grow
    from call to call, which changes no time; errors are taken on copies.
    """

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(SEED)
        s = shape
        self.x = self.normal(1, s.T, s.N, dtype=s.x_dtype).requires_grad_()
        self.base = self.normal(1, s.T, s.M, dtype=s.x_dtype)
        self.grad = self.normal(1, s.T, s.M, dtype=s.x_dtype)
        self.adapter = {
            "A": self.parameter(s.k, s.N // s.k, s.r, scale=(s.N / s.k) ** -0.5),
            "B": self.parameter(s.k, s.r, s.M // s.k, scale=s.r**-0.5),
        }
        if s.h:
            self.adapter["A_general"] = self.parameter(s.h, s.N, scale=s.N**-0.5)
            self.adapter["B_general"] = self.parameter(s.M, s.h, scale=s.h**-0.5)

    def parameter(self, *size: int, scale: float) -> torch.nn.Parameter:
        """Normal values of deviation ``scale`` in the adapter's dtype."""
        return torch.nn.Parameter(self.normal(*size, dtype=self.shape.adapter_dtype, scale=scale))

    def normal(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=self._generator, device=self.device) * scale).to(dtype)


class GivenOutput(nn.Linear):
    """A base layer that costs nothing: its output is the tensor in ``given``, and it has no weight to speak of.

    With it a layer's own work can be timed alone. The tensor is held in a list, since assigning a
    module's attribute costs as much as a small kernel.
    """

    def __init__(self, shape: Shape, device: torch.device):
        nn.Module.__init__(self)
        self.in_features, self.out_features = shape.N, shape.M
        self.weight = nn.Parameter(torch.empty(0, dtype=shape.x_dtype, device=device), requires_grad=False)
        self.register_parameter("bias", None)
        self.given: list[Tensor] = [torch.empty(0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.given[0]


@dataclass(frozen=True)
class Path:
    """One implementation of the adapter path.

    ``call(x, base)`` returns y and may write into base. ``operands(*parameters)`` are the arguments
    A, B, A_general and B_general with which :mod:`gralora_ext.reference` computes the same.
    ``our_dropout``: our generator draws the mask.
    """

    call: Call
    parameters: tuple[Tensor, ...]
    operands: Callable[..., dict[str, Tensor]]
    our_dropout: bool = False


def paths(data: Data) -> dict[str, Path]:
    """All contenders on ``data`` by name; those with GraLoRA share its parameters, LoRA has as many of its own."""
    names, parameters, factors = tuple(data.adapter), tuple(data.adapter.values()), lora_factors(data)

    def operands(*tensors: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, tensors, strict=True))

    def functional(operation: Callable[..., Tensor]) -> Call:
        return lambda x, base: operation(x, base, **data.adapter, scaling=SCALING, dropout_p=data.shape.dropout)

    def layer(make: Callable[..., nn.Module], *arguments: Any) -> Call:
        base_layer = GivenOutput(data.shape, data.device)
        module, given = make(data, base_layer, *arguments), base_layer.given

        def call(x: Tensor, base: Tensor) -> Tensor:
            given[0] = base
            return module(x)

        return call

    return {
        "ours": Path(layer(our_layer), parameters, operands, our_dropout=True),
        "ours-op": Path(functional(gralora_ext.ops.gralora), parameters, operands, our_dropout=True),
        "peft": Path(layer(peft_layer), parameters, operands),
        "lora": Path(layer(lora_layer, factors), factors, lora_operands),
        "torch": Path(functional(plain_torch.gralora), parameters, operands),
    }


def compiled(path: Path) -> Path:
    """``path`` under torch.compile; compiling happens in its first call.

    Raises:
        Skip: there is no C++ compiler.
    """
    if shutil.which("g++") is None:
        raise Skip("torch.compile needs a C++ compiler, and g++ is not on PATH")
    torch.compiler.reset()  # torch counts how often a function was compiled anew, and from the ninth time on runs it as it is
    return Path(torch.compile(path.call, dynamic=False), path.parameters, path.operands)


def linear(weight: Tensor) -> nn.Linear:
    """A frozen layer on ``weight [M, N]``, which may be shared."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def our_layer(data: Data, base: nn.Linear) -> nn.Module:
    with gralora_ext.enable():
        return peft_layer(data, base)


def peft_layer(data: Data, base: nn.Linear) -> nn.Module:
    s = data.shape
    config = GraloraConfig(
        r=s.r,
        gralora_k=s.k,
        hybrid_r=s.h,
        alpha=SCALING * (s.r + s.h),
        gralora_dropout=s.dropout,
        target_modules=["layer"],
    )
    layer = _adapted(base, config)
    layer.gralora_A["default"], layer.gralora_B["default"] = data.adapter["A"], data.adapter["B"]
    if s.h:
        layer.gralora_A_general["default"].weight = data.adapter["A_general"]
        layer.gralora_B_general["default"].weight = data.adapter["B_general"]
    return layer


def lora_layer(data: Data, base: nn.Linear, factors: tuple[Tensor, Tensor]) -> nn.Module:
    rank = data.shape.r + data.shape.h
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=data.shape.dropout, target_modules=["layer"])
    layer = _adapted(base, config)
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = factors
    return layer


def lora_factors(data: Data) -> tuple[Tensor, Tensor]:
    """LoRA's A ``[r+h, N]`` and B ``[M, r+h]``: as many parameters as the GraLoRA of ``data`` has."""
    rank = data.shape.r + data.shape.h
    return (
        data.parameter(rank, data.shape.N, scale=data.shape.N**-0.5),
        data.parameter(data.shape.M, rank, scale=rank**-0.5),
    )


def lora_operands(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """LoRA is GraLoRA with k = 1."""
    return {"A": A.T[None], "B": B.T[None]}


def _adapted(base: nn.Linear, config: Any) -> nn.Module:
    """The adapter layer that PEFT puts around ``base``, by its public API: that is the same in all its versions."""
    return get_peft_model(nn.Sequential(OrderedDict(layer=base)), config).base_model.model.layer


def path_error(path: Path, data: Data, *, gradients: bool) -> float | None:
    """The greatest ``‖actual − expected‖ / ‖expected‖`` of y and, with ``gradients``, of dx and the adapter's gradients.

    The contender runs on all tokens, the reference on the first ``TOKENS``. None where the
    contender draws a dropout mask that the reference does not know.
    """
    s = data.shape
    if s.dropout and not path.our_dropout:
        return None
    rows = min(s.T, TOKENS)
    grad = data.grad.clone()
    grad[:, rows:] = 0
    with torch.set_grad_enabled(gradients):
        torch.manual_seed(SEED)
        y = path.call(data.x, data.base.clone())
        actual = [y[:, :rows]]
        if gradients:
            dx, *rest = torch.autograd.grad(y, (data.x, *path.parameters), grad)
            actual += [dx[:, :rows], *rest]
        torch.manual_seed(SEED)
        x, *parameters = (t.detach().double().requires_grad_(gradients) for t in (data.x[:, :rows], *path.parameters))
        y = reference.gralora(
            x, data.base[:, :rows].double(), **path.operands(*parameters), scaling=SCALING, dropout_p=s.dropout
        )
        expected = [y]
        if gradients:
            expected += torch.autograd.grad(y, (x, *parameters), grad[:, :rows].double())
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in float64."""
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()


def layers(data: Data, *names: str) -> dict[str, nn.Module]:
    """The layers of these names, on one weight ``[M, N]`` in the activations' dtype.

    ``base`` is frozen and has no adapter; ``ours-path`` is ours that calls its base layer and adds
    the path; ``ours-plain`` is ours that keeps nothing of a merge, so that it is taken off but for
    rounding.
    """
    s = data.shape
    weight = data.normal(s.M, s.N, dtype=s.x_dtype, scale=s.N**-0.5)
    factors = lora_factors(data)
    make = {
        "base": linear,
        "ours": lambda weight: our_layer(data, linear(weight)),
        "ours-path": lambda weight: our_layer(data, linear(weight)),
        "ours-plain": lambda weight: our_layer(data, linear(weight)),
        "peft": lambda weight: peft_layer(data, linear(weight)),
        "lora": lambda weight: lora_layer(data, linear(weight), factors),
    }
    made = {name: make[name](weight) for name in names}
    if "ours-path" in made:
        made["ours-path"].one_operation = False
    if "ours-plain" in made:
        made["ours-plain"].exact_unmerge = False
    return made


def with_weights_of_their_own(adapted: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The same layers: each is merged and unmerged alone, as ours would notice."""
    for layer in adapted.values():
        base = layer.get_base_layer()
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    return adapted


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
