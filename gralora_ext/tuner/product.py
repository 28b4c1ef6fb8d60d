"""When a layer is computed as one product, ``y = x (W + ΔW)ᵀ + bias``, beside its base layer instead of through it.

That is quicker where many tokens meet a frozen float32 weight on a CPU on which our GEMM is quicker than torch's, and the same function
of the parameters. With dropout in training, where W + ΔW is not what multiplies x, the layer's own product is taken over alone.
Either is right only where calling the base layer would do nothing but multiply. Everything else goes through the base layer: quantized, offloaded, hooked,
trained and subclassed ones, and those whose tensors are of a subclass, such as DTensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from transformers.pytorch_utils import Conv1D

from .._loader import load

if TYPE_CHECKING:
    from .layer import GraloraLinear

_TOKENS = 64  # from this many on; fewer do not repay W + ΔW

_native = load()
# On AMD's processors MKL stays on AVX2; ours has reached twice its speed by AVX-512, and 1.1 times by AVX2. On a Xeon one product
# took 1.0 to 1.1 of the time of base layer and path.
_IS_QUICKER = (
    _native.cpu_capability() != "default" and _native.cpu_vendor() == "amd" and torch.backends.mkl.is_available()
)
_TENSORS = (Tensor, nn.Parameter)  # no subclass of a library's
_FORWARDS = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward}  # a patched class is called


def sole_adapter(layer: GraloraLinear, x: Tensor) -> str | None:
    """The adapter with which ``layer`` may be one product for ``x``, or None where its base layer is to be called.

    It is asked at every call, so what is cheap and often false comes first; a decode step pays 0.2 µs for it.
    """
    if type(x) not in _TENSORS or x.numel() < _TOKENS * layer.in_features or x.dtype != torch.float32 or not x.is_cpu:
        return None
    base = layer.base_layer
    if not _IS_QUICKER or type(base) not in _FORWARDS:
        return None
    names = [name for name in layer.active_adapters if name in layer.gralora_A]
    if len(names) != 1 or not _is_plain_mode() or not _only_multiplies(base):
        return None
    (name,) = names
    A, dropout = layer.gralora_A[name], layer.gralora_dropout[name]
    if A.dtype == torch.float64:  # sums would be in float64
        return None
    if dropout.training and isinstance(dropout, nn.Dropout) and dropout.p != 0.0:
        return name  # W stays without ΔW: only the GEMM is ours
    k, _, r = A.shape
    tokens = x.numel() // layer.in_features
    return name if _pays(tokens, layer.in_features, layer.out_features, k, r, layer.hybrid_r[name]) else None


def _pays(tokens: int, n: int, m: int, k: int, r: int, h: int) -> bool:
    """Whether making W + ΔW, 2NM(r/k + h) FLOPs, takes at most half of what it saves of a product of 2NM·tokens.

    That is half of the product itself, since our GEMM is quicker, and the path's share of it.
    """
    share = (r + h) * (n + m) / (n * m)
    return 2 * (r / k + h) <= tokens * (1 + share)


def weight_of(base: nn.Module) -> Tensor:
    """The weight of an eligible base layer as ``[M, N]``."""
    return base.weight.t() if type(base) is Conv1D else base.weight


def _is_plain_mode() -> bool:
    """Eager mode in full precision, where nobody looks at the operations that torch runs."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _multiplies_in_full_precision()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _multiplies_in_full_precision() -> bool:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:  # torch before 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("none", "ieee")


def _only_multiplies(base: nn.Module) -> bool:
    """Whether calling ``base`` is ``x Wᵀ + bias`` with float32 tensors that need no gradient, and nothing beside it."""
    kind, parameters = type(base), base._parameters
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    hooked_everywhere = (
        global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
    )
    return (
        not (hooked or hooked_everywhere or "forward" in vars(base))
        and kind.forward is _FORWARDS[kind]
        and _is_frozen(parameters.get("weight"))
        and (parameters.get("bias") is None or _is_frozen(parameters["bias"]))
    )


def _is_frozen(parameter: Tensor | None) -> bool:
    return (
        type(parameter) in _TENSORS
        and parameter.dtype == torch.float32
        and parameter.is_cpu
        and parameter.layout == torch.strided
        and not (parameter.requires_grad and torch.is_grad_enabled())
    )
