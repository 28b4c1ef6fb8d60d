# SPDX-License-Identifier: Apache-2.0
"""GraLoRA over quantized base layers: how a packed weight is read, written, kept and put back.

Merging is ``Q(D(W) + dW)``: D is the library's own dequantization, the sum is taken in float32, and Q quantizes with the layer's own
settings. The packed weight of before stays beside the layer, and unmerging puts it back: the same bits.

PEFT's ``QuantizationBackend`` knows the libraries. Where it is not right, this file does it: its 4-bit backend marks the old weight as not
quantized and gives the new one another dtype, and its HQQ backend loses the layer's bias.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import peft
import torch
from packaging.version import Version
from peft.tuners.gralora.layer import GraloraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers.pytorch_utils import Conv1D

from .. import ops, repacking
from . import exact
from .config import NEEDED_PEFT

if Version(peft.__version__) >= Version(NEEDED_PEFT):
    from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend

    NEEDS = ""  # for the end of a sentence on what is refused
else:
    NEEDS = f"; quantized weights need peft {NEEDED_PEFT} or newer, found {peft.__version__}"

    def get_quantization_kwargs(model: Any) -> dict[str, Any]:
        return {}

    def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:
        return None


if TYPE_CHECKING:
    from .layer import GraloraLinear


def prepare(model: nn.Module) -> None:
    """Makes ``model``, which has GraLoRA layers, fit for training and merging where it is quantized; else does nothing.

    Layers without an adapter too, since gradients flow through them.
    """
    repacking.stop(model)
    kwargs: dict[str, Any] = next(filter(None, map(get_quantization_kwargs, model.modules())), {})
    for module in model.modules():
        if _multiplies_without_derivative(module) and straight_through not in module._forward_hooks.values():
            module.register_forward_hook(straight_through)
        if isinstance(module, GraloraLayer):
            module.quantization_backend = _backend(module.get_base_layer(), kwargs)


def release(model: nn.Module) -> None:
    """The quantized layers of ``model``, which has no layers of ours any more, as they were: :func:`prepare` undone."""
    repacking.allow(model)
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook is straight_through]:
            del module._forward_hooks[key]


def _backend(base: nn.Module, kwargs: dict[str, Any]) -> Any:
    """PEFT's backend for ``base``; None where it is not quantized, or nothing is known that could quantize it again."""
    if type(base) in (nn.Linear, Conv1D) and type(base._parameters.get("weight")) is nn.Parameter:
        return None  # at once: PEFT imports each library that it asks
    try:
        return resolve_quantization_backend(base, **kwargs)
    except ValueError:  # a torchao weight, and the model does not say with what configuration it was made
        return None


def stand_in(target: nn.Module) -> nn.Linear | None:
    """A linear layer of the widths of a quantized ``target`` that is no nn.Linear itself, for PEFT's layer to be made over.

    None where ``target`` is none of those, and PEFT takes it or refuses it.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, nn.Linear) or _backend(base, {}) is None:
        return None
    return skip_init(nn.Linear, base.in_features, base.out_features, bias=False)  # its elements are never looked at


def packed(base: nn.Module) -> Tensor:
    """The tensor that holds the elements of the weight, packed or not."""
    return next(getattr(base, name) for name in ("W_q", "qweight", "weight") if hasattr(base, name))


def check(layer: GraloraLinear) -> None:
    """Raises a TypeError where the quantized weight of ``layer`` cannot be written."""
    backend, base = layer.quantization_backend, layer.get_base_layer()
    if not backend.supports_merge:
        raise TypeError(
            f"merging needs a base weight that can be quantized again, and {backend.backend_name} weights cannot: load the base "
            "model in a floating-point dtype, and the adapter over it"
        )
    if backend.backend_name == "bnb 8bit" and packed(base).dtype != torch.int8:
        raise TypeError(
            f"merging needs a base weight of bitsandbytes' 8 bits, got {packed(base).dtype}: the layer was made with "
            "has_fp16_weights=True, or is not on its device yet"
        )


def merge(layer: GraloraLinear, adapter: str, safe: bool) -> None:
    """Writes Q(D(W) + dW) and notes the error of Q in ``layer.merge_errors``; all or nothing.

    Raises:
        ValueError: the sum is not finite (``safe``).
        TypeError: the library's settings did not make a weight of the same kind.
    """
    weights: Any = [None if t is None else t.detach().float() for t in layer._weights(adapter)]
    A, B, A_general, B_general = weights
    delta = ops.delta_weight(A, B, scaling=layer.scaling[adapter], A_general=A_general, B_general=B_general)
    total = read(layer) + delta
    if safe and not torch.isfinite(total).all():
        raise ValueError(exact.not_finite(adapter))
    before = contents(layer.get_base_layer())
    try:
        with torch.no_grad():
            _write(layer, total)
            lost = read(layer).sub_(total)
    except BaseException:
        put_back(before)
        raise
    layer.kept_weight = layer.kept_weight or before
    # 0 where nothing is lost, also of an adapter of zeros; infinite where that one loses anything
    error = (lost.norm() / delta.norm()).item() if lost.any() else 0.0
    layer.merge_errors = {**layer.merge_errors, adapter: error}


def unmerge(layer: GraloraLinear) -> None:
    """The packed weight of before the first merge, with its statistics."""
    device = packed(layer.get_base_layer()).device
    put_back(layer.kept_weight)
    base = layer.get_base_layer()
    if packed(base).device != device:  # the model was moved while it was merged
        base.to(device)
    layer.kept_weight, layer.merge_errors = (), {}


def read(layer: GraloraLinear) -> Tensor:
    """D(W) ``[M, N]``, what the library's dequantization gives, as a new tensor in float32."""
    return layer.quantization_backend.get_base_weight(layer.get_base_layer()).detach().to(torch.float32, copy=True)


def _write(layer: GraloraLinear, weight: Tensor) -> None:
    base: Any = layer.get_base_layer()
    backend, old = layer.quantization_backend, packed(base)
    if backend.backend_name == "bnb 4bit":
        _write_4bit(base, weight)
    elif backend.backend_name == "hqq":
        _write_hqq(base, weight)
    else:  # torchao takes the dtype in which the layer computes from what it quantizes
        backend.set_base_weight(layer, weight.to(old.dtype) if old.is_floating_point() else weight)
    new = packed(base)
    if (type(new), new.shape, new.dtype) != (type(old), old.shape, old.dtype):
        raise TypeError(
            f"quantizing the merged weight gave {type(new.data).__name__} of {new.dtype}, where the base weight is "
            f"{type(old.data).__name__} of {old.dtype}: the model's quantization configuration does not say how this layer was made"
        )


def _write_4bit(base: Any, weight: Tensor) -> None:
    from bitsandbytes.nn import Params4bit

    old = base.weight
    settings = {
        name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    base.weight = Params4bit(weight, requires_grad=False, module=old.module, **settings).to(old.device)
    base.weight.quant_state.dtype = old.quant_state.dtype


def _write_hqq(base: Any, weight: Tensor) -> None:
    settings = copy.deepcopy(base.quant_config)
    new = type(base)(
        None, {**settings, "offload_meta": base.offload_meta}, compute_dtype=base.compute_dtype, device=base.device
    )
    new.quantize(weight, **settings)
    base.W_q, base.meta = new.W_q, new.meta


def contents(base: Any) -> tuple[tuple[Any, str, Any], ...]:
    """Where the packed weight and its statistics are, as (holder, attribute, object); nothing writes into these objects."""
    places = [(base, "weight"), (base, "quant_state"), (base, "W_q"), (base, "meta")]
    if hasattr(base, "state"):
        places += [(base.state, "CB"), (base.state, "SCB")]
    return tuple((holder, name, getattr(holder, name)) for holder, name in places if hasattr(holder, name))


def put_back(contents: tuple[tuple[Any, str, Any], ...]) -> None:
    """Makes the packed weight and its statistics what :func:`contents` has found."""
    for holder, name, value in contents:
        setattr(holder, name, value)


def _multiplies_without_derivative(module: nn.Module) -> bool:
    """Whether ``module`` quantizes its input: torchao's product of two quantized matrices is unknown to autograd."""
    return getattr(module._parameters.get("weight"), "act_quant_kwargs", None) is not None


def straight_through(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook: ``dx = dy D(W)``, as if the input had not been rounded, where the product of ``module`` has no derivative."""
    (x, *_) = args
    if not (torch.is_grad_enabled() and x.requires_grad) or output.requires_grad:
        return output
    return _StraightThrough.apply(x, output, module.weight)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.dequantize().to(grad.dtype), None, None
