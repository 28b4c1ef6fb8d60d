"""The contenders: the same adapter path by our layer, our operation, PEFT's GraLoRA and LoRA, and plain torch."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import GraloraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import gralora_ext

from . import plain_torch
from .data import Data
from .errors import Skip
from .shapes import Shape

SCALING = 1.0

Call = Callable[[Tensor, Tensor], Tensor]


class GivenOutput(nn.Linear):
    """A base layer that costs nothing: its output is the tensor in ``given``, and it has no weight to speak of.

    With it a layer's own work can be timed alone. The tensor is held in a list, since assigning a module's attribute
    costs as much as a small kernel.
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

    ``call(x, base)`` returns y and may write into base. ``operands(*parameters)`` are the arguments A, B, A_general and
    B_general with which :mod:`gralora_ext.reference` computes the same. ``our_dropout``: our generator draws the mask.
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
