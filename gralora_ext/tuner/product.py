"""When a layer is computed as one product, ``y = x (W + ΔW)ᵀ + bias``, beside its base layer instead of through it.

That is quicker where many tokens meet a frozen float32 weight on the CPU, and the same function of the parameters; it is
right only where calling the base layer would do nothing but multiply. Everything else goes through the base layer: quantized,
sharded, offloaded, hooked, trained and subclassed ones.
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
# Where torch's GEMM is as quick as ours, the product of a wide weight with a small adapter has nothing to win: the path's work as
# a share of the base layer's, (r + h)(N + M)/(NM), must be at least this.
_SHARE = 1 / 32

_native = load()
_HAS_KERNEL = _native.cpu_capability() != "default"
# On AMD's processors MKL stays on AVX2; ours has reached twice its speed by AVX-512, and 1.1 times by AVX2.
_WINS_ANYWAY = _native.cpu_vendor() == "amd" and torch.backends.mkl.is_available()
_TENSORS = (Tensor, nn.Parameter)  # no subclass of a library's
_FORWARDS = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward}  # a patched class is called
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def sole_adapter(layer: GraloraLinear, x: Tensor) -> str | None:
    """The adapter with which ``layer`` may be one product for ``x``, or None where its base layer is to be called."""
    if type(x) not in _TENSORS or x.numel() < _TOKENS * layer.in_features or x.dtype != torch.float32 or not x.is_cpu:
        return None
    names = [name for name in layer.active_adapters if name in layer.gralora_A]
    if not _HAS_KERNEL or len(names) != 1:
        return None
    name, base = names[0], layer.base_layer
    dropout = layer.gralora_dropout[name]
    drops = dropout.training and isinstance(dropout, nn.Dropout) and dropout.p != 0.0
    sums_in_float32 = layer.gralora_A[name].dtype != torch.float64
    if drops or not sums_in_float32 or not _is_plain_mode() or not _only_multiplies(base):
        return None
    return name if _pays(layer, name, x.numel() // layer.in_features) else None


def _pays(layer: GraloraLinear, name: str, tokens: int) -> bool:
    """Whether making W + ΔW, 2NM(r/k + h) FLOPs, takes at most half of what it saves of a product of 2NM·tokens.

    That is the path's share of the product, and half of the product itself where our GEMM wins anyway.
    """
    k, block_in, r = layer.gralora_A[name].shape
    n, m, h = k * block_in, layer.out_features, layer.hybrid_r[name]
    share = (r + h) * (n + m) / (n * m)
    if not _WINS_ANYWAY and share < _SHARE:
        return False
    return 2 * (r / k + h) <= tokens * (share + _WINS_ANYWAY)


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
    return (
        type(base) in _FORWARDS
        and type(base).forward is _FORWARDS[type(base)]
        and "forward" not in vars(base)
        and not any(getattr(base, name) for name in _HOOKS)
        and not any(getattr(global_hooks, name) for name in _GLOBAL_HOOKS)
        and all(_is_frozen(p) for p in (base.weight, base.bias) if p is not None)
    )


def _is_frozen(parameter: Tensor) -> bool:
    return (
        type(parameter) in _TENSORS
        and parameter.dtype == torch.float32
        and parameter.is_cpu
        and parameter.layout == torch.strided
        and not (parameter.requires_grad and torch.is_grad_enabled())
    )
