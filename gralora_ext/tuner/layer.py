# SPDX-License-Identifier: Apache-2.0
"""The fused layer: PEFT's GraLoRA layer, its parameters untouched and its arithmetic done by :mod:`gralora_ext.ops`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners.gralora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module
from torch.nn.utils import parametrize

from .. import kernels, ops, reference
from .._loader import load
from ..reference import draw_seed
from . import exact, frozen, init, mixed_batch, quantized

_ORIGINALS = {"weight_g", "weight_orig"}  # from which torch.nn.utils' older functions compute a weight
_native = load()


class GraloraLinear(Linear):
    """``y = base_layer(x) + Σ_adapters s·exchange(x_n A_n) B_j (+ s·(x Agᵀ) Bgᵀ)``, one kernel per active adapter.

    Where calling a frozen base layer would do nothing but multiply, the two are one operation instead
    (:func:`gralora_ext.ops.linear`, ``frozen.py``): in training, of many tokens on the CPU and of any number on CUDA; and on AMD's
    processors in float32, as one product with W + ΔW.

    Built by :class:`~gralora_ext.tuner.GraloraModel`, or made in place of PEFT's layer by
    :func:`~gralora_ext.tuner.accelerate`. It differs from PEFT's layer in this: x may have any rank ≥ 1 (PEFT: 2 or 3);
    the adapter computes in float32 without a cast copy of x; the block part and the hybrid part share one dropout mask
    (PEFT draws two); a merge rounds once; ``get_delta_weight`` is not differentiable. Like PEFT's it adds into the base
    layer's output in place; where a forward hook or a forward of the base layer's own may have kept that output, it does not.
    """

    # Read by peft.helpers.disable_input_dtype_casting, which fails on PEFT's own layer; this one
    # never casts its input.
    cast_input_dtype_enabled: bool = True

    # False, on the class or on a layer: the base layer is always called. Not stored in checkpoints.
    one_operation: bool = True

    # Whether an adapter's scaling is by the root; a layer that PEFT has built has none such.
    use_rslora: Mapping[str, bool] = MappingProxyType({})
    other_param_names = (*Linear.other_param_names, "use_rslora")

    # PEFT's, for a quantized base layer (quantized.py): the packed weight of before the first
    # merge, and by adapter how much of dW quantizing again has lost.
    quantization_backend: Any = None
    kept_weight: tuple[tuple[Any, str, Any], ...] = ()
    merge_errors: Mapping[str, float] = MappingProxyType({})

    # Whether unmerge() gives back the bits of before (exact.py). A merge then keeps a byte for each
    # weight, at most a tenth of one more, and a copy of the adapter; where codes do not do, a copy
    # of the weight. False, on the class or on a layer: nothing is kept. Not stored in checkpoints.
    exact_unmerge: bool = True
    # What takes the merged adapters off; and while a whole model is merged, what takes back each
    # step.
    kept_merge: exact.Kept | None = None
    journal: list[exact.Kept] | None = None

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter, as PEFT's layer does, and gives it what PEFT's does not know of the configuration."""
        super().update_layer(adapter_name, *args, **kwargs)
        init.finish(self, adapter_name, kwargs.get("config"))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Makes the scaling of ``adapter``, if the layer has it, ``scale`` times what alpha, r and h make it."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * init.scaling(self, adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scaling of each active adapter by ``scale``."""
        for adapter in self._active_here():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scaling of each active adapter by ``scale``; None makes it again what alpha, r and h make it."""
        for adapter in self._active_here():
            self.scaling[adapter] = init.scaling(self, adapter) if scale is None else self.scaling[adapter] / scale

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The layer's output in x's dtype; that of the base layer, as it is, where no adapter is added.

        Args:
            x: ``[..., N]``.
            args, kwargs: passed on to the base layer.
            adapter_names: an adapter for each row of x, ``"__base__"`` for none; for inference.

        Raises:
            ValueError: ``adapter_names`` has not as many names as x has rows, or an adapter is merged; the adapter is on another
                device than x; or :func:`gralora_ext.ops.gralora` refuses a shape.
            TypeError: :func:`gralora_ext.ops.gralora` refuses a dtype.
        """
        if adapter_names is not None:
            return mixed_batch.forward(self, x, adapter_names, *args, **kwargs)
        # What PEFT's properties and nn.Module's own lookup return: calls, which cost microseconds
        # here (frozen.how_to_multiply).
        modules, base_layer = self._modules, self._modules["base_layer"]
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        adds = not (self._disable_adapters or self.merged_adapters)
        if adds and self.one_operation and not (args or kwargs):
            how = frozen.how_to_multiply(self, x)
            if how is not None:
                name, own_gemm = how
                weight, bias = frozen.weight_of(base_layer), base_layer._parameters.get("bias")
                return _native.linear(x, weight, bias, *self._path(name, x), own_gemm)
        result = base_layer(x, *args, **kwargs)
        if not adds:
            return result
        # In place, as PEFT's layer does it, into the output of a linear layer; but a hook, or a
        # forward of somebody's own, may have kept that.
        in_place = (
            (frozen.has_librarys_forward(base_layer) or self.quantization_backend is not None)
            and not (base_layer._forward_hooks or module._global_forward_hooks)
            and (x.is_cpu or kernels.has_kernels(x.device))
            and _native.may_write_into(result, x)
        )
        active, adapters = self._active_adapter, modules["gralora_A"]
        for name in (active,) if type(active) is str else active:
            if name in adapters._parameters or name in adapters:  # FSDP puts tensors in the parameters' places
                result = self.add_path(name, x, result, in_place)
        return result if result.dtype == x.dtype else result.to(x.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' weights to the base weight in place, one after the other.

        With ``exact_unmerge``, what leads back to the bits of before is kept until :meth:`unmerge`: a byte for each weight, at most a
        tenth of one more, and a copy of A, B and the scaling; the weight itself, copied, where adapters change it so much that bytes
        do not do. Without, nothing is kept.

        A quantized weight becomes Q(D(W) + dW): dequantized, added to in float32, and quantized again with its own settings.
        ``merge_errors[adapter]`` is then ‖Q(D(W) + dW) - (D(W) + dW)‖ / ‖dW‖. The packed weight of before is kept.

        Args:
            safe_merge: merge into a copy and keep it only if it is finite; an adapter that fails leaves the base weight
                as it was before this adapter, with the adapters before it in the list merged.
            adapter_names: the adapters to merge; None means the active ones.

        Raises:
            ValueError: the merged weight is not finite (``safe_merge``), or weight and adapter are not on one device.
            TypeError: the base weight is neither a floating-point tensor nor of a library that can quantize it again.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.gralora_A]
        for name in names:
            self.check_mergeable(name)
        keeps = self.exact_unmerge or self.kept_merge is not None or self.journal is not None
        if not names:
            return
        if self.quantization_backend is not None:
            for name in names:
                quantized.merge(self, name, safe_merge)
                self.merged_adapters.append(name)
        elif keeps and exact.can_keep(self.get_base_layer().weight, (t for n in names for t in self._weights(n))):
            exact.merge(self, names, safe_merge)
        else:
            for name in names:
                self._merge_without_codes(name, safe_merge)

    def _merge_without_codes(self, adapter: str, safe: bool) -> None:
        weight = self.get_base_layer().weight
        merged = weight.detach().clone() if safe else weight
        operands = exact.Operands._make((adapter, *self._weights(adapter), self.scaling[adapter]))
        exact.add(merged, operands, self.fan_in_fan_out)
        if safe:
            if not torch.isfinite(merged).all():
                raise ValueError(exact.not_finite(adapter))
            weight.data = merged
        self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Takes all merged adapters off. The base weight has the bits of before the first merge, or a warning says why it has not.

        A weight that was changed, cast or moved while it was merged has no way back to these bits; as one that was merged without
        ``exact_unmerge``, it is subtracted from, one adapter after the other, exact up to the rounding of its dtype. A quantized
        weight is the one of before.
        """
        if not self.merged:
            return super().unmerge()  # PEFT's warning that there is nothing to do
        with onload_layer(self):  # set_adapter and forward call this on offloaded layers
            reason = self.take_off()
        if reason is not None:
            warnings.warn(inexact(f"the base weight of {self.module_name} {reason}"), stacklevel=2)

    def take_off(self) -> str | None:
        """:meth:`unmerge` of a merged layer, without the warning: returns its reason."""
        if not self.kept_weight:
            return exact.unmerge(self)
        quantized.unmerge(self)
        self.merged_adapters.clear()
        return None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The weight that :meth:`merge` adds: ``[M, N]`` (``[N, M]`` with fan_in_fan_out), in the adapter's dtype."""
        A, B, A_general, B_general = self._weights(adapter)
        return ops.delta_weight(
            A,
            B,
            scaling=self.scaling[adapter],
            A_general=A_general,
            B_general=B_general,
            fan_in_fan_out=self.fan_in_fan_out,
        )

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]

    def add_path(self, name: str, x: Tensor, result: Tensor, in_place: bool) -> Tensor:
        """``result`` and the path of x through an adapter, in the memory of ``result`` if it may be."""
        dropout = self._modules["gralora_dropout"]._modules[name]
        if not frozen.is_fused_dropout(dropout):
            x = dropout(x.to(self.gralora_A[name].dtype))
        path = self._path(name, x)
        A, _, A_general, _, seed, scaling, dropout_p = path
        if A_general is None and self.hybrid_r[name] > 0:
            kept = x if seed is None else reference.drop(x, seed, dropout_p)
            latents = self.gralora_A_general[name](kept.to(A.dtype))
            result = result + scaling * self.gralora_B_general[name](latents).to(result.dtype)
        return _native.gralora_into(x, result, *path) if in_place else ops.add_path(x, result, *path)

    def _path(self, adapter: str, x: Tensor) -> tuple[Any, ...]:
        """What the ops take of the adapter beside ``x``: A, B, A_general, B_general, a dropout seed, the scaling and p.

        The general parts are None where there are none, and where their modules are to be called: an engine has wrapped them and
        puts their weights in place only then, or somebody listens to them.
        """
        A, B = self._blocks(adapter)
        if x.device != A.device:
            A, B = (
                _from_elsewhere(self._modules[name], adapter, t) for name, t in (("gralora_A", A), ("gralora_B", B))
            )
        if x.device != A.device:
            exact.refuse_device("the input", x.device, adapter, A)
        A_general = B_general = None
        if self.hybrid_r[adapter] > 0:
            modules = self._modules
            A_module = modules["gralora_A_general"]._modules[adapter]
            B_module = modules["gralora_B_general"]._modules[adapter]
            if frozen.only_multiplies(A_module) and frozen.only_multiplies(B_module):
                A_general, B_general = A_module.weight, B_module.weight
                if not A_general.dtype == B_general.dtype == A.dtype:  # cast by what looks for modules with a weight
                    A_general, B_general = A_general.to(A.dtype), B_general.to(A.dtype)
        dropout = self._modules["gralora_dropout"]._modules[adapter]  # nn.Identity where there is none
        if type(dropout) is not nn.Dropout or not dropout.training or not 0.0 < dropout.p < 1.0:
            return A, B, A_general, B_general, None, self.scaling[adapter], 0.0
        return A, B, A_general, B_general, draw_seed(x.device), self.scaling[adapter], dropout.p

    def _blocks(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A and B. An engine that keeps parameters elsewhere puts them in place when their container is asked for them."""
        A, B = self._modules["gralora_A"], self._modules["gralora_B"]
        held_A, held_B = A._parameters, B._parameters
        if type(held_A) is dict and type(held_B) is dict and adapter in held_A and adapter in held_B:
            return held_A[adapter], held_B[adapter]
        return A[adapter], B[adapter]

    def _weights(self, adapter: str) -> tuple[Any, ...]:
        """A, B, A_general and B_general for a merge, the latter two None where there are none."""
        A, B = self._blocks(adapter)
        if self.hybrid_r[adapter] == 0:
            return A, B, None, None
        general = (self.gralora_A_general[adapter].weight, self.gralora_B_general[adapter].weight)
        return A, B, *(weight.to(A.dtype) for weight in general)

    def check_mergeable(self, adapter: str | None) -> None:
        """Whether the base weight can be merged into; and, if one is named, this adapter.

        Raises:
            ValueError: the base weight and the adapter, if one is named, are not on one device.
            TypeError: the base weight cannot be merged into.
        """
        base = self.get_base_layer()
        weight = quantized.packed(base)
        if adapter is not None and weight.device != (A := self.gralora_A[adapter]).device:
            exact.refuse_device("the base weight", weight.device, adapter, A)
        if self.quantization_backend is not None:
            return quantized.check(self)
        if parametrize.is_parametrized(base, "weight") or not _ORIGINALS.isdisjoint(base._parameters):
            raise TypeError(
                f"merging needs a weight of its own, and that of {self.module_name} is computed at every call (by a "
                "parametrization, weight_norm, spectral_norm or pruning): remove that first"
            )
        # A quantized weight may report a float dtype, as torchao's do; such classes, and DTensor,
        # keep their elements elsewhere.
        dense = type(weight.data) in (Tensor, FakeTensor)
        if not weight.is_floating_point() or not dense:
            kind = "" if dense else f" of class {type(weight.data).__name__}"
            raise TypeError(
                f"merging needs a dense floating-point base weight, got {weight.dtype}{kind}: dequantize or gather the base "
                f"model first, or load it in a floating-point dtype{quantized.NEEDS}"
            )


def inexact(what: str) -> str:
    """The warning where ``what`` keeps codes from leading back."""
    return f"{what}: it is the weight of before the merge except for rounding"


def _from_elsewhere(container: nn.Module, adapter: str, tensor: Tensor) -> Tensor:
    """The tensor in place of one on meta that accelerate keeps in other memory or on disk, for as long as it is used.

    Accelerate puts weights in place when their module is called, which a container of parameters never is. There is
    no gradient: where one is wanted, ``tensor`` stays on meta.
    """
    hook: Any = getattr(container, "_hf_hook", None)
    wanted = tensor.requires_grad and torch.is_grad_enabled()
    if not tensor.is_meta or wanted or not getattr(hook, "offload", False):
        return tensor
    return hook.weights_map[adapter].to(hook.execution_device)
