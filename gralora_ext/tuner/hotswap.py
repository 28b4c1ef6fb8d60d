# SPDX-License-Identifier: Apache-2.0
"""Another adapter's weights in the place of those that are loaded, in the same tensors, so that compiled models go on.

:func:`gralora_ext.enable` puts these functions where PEFT has its own, which know LoRA alone, and still serve it.

A layer keeps its scaling at a swap, because a compiled graph holds it as a number; B is multiplied by the quotient of
the new scaling and the old one. That rounds B once, where the quotient is no power of two. In return the configuration
of the loaded adapter stays true, and what is saved after a swap loads as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftType
from peft.tuners.gralora import GraloraLayer
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap as pefts
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from . import blocks, init, patterns
from .config import check_peft

_pefts_prepare = pefts.prepare_model_for_compiled_hotswap
_pefts_swap = pefts.hotswap_adapter_from_state_dict
# What must be the same in both configurations, as PEFT asks: it is neither in the weights nor,
# here, in B.
SAME_IN_BOTH = ["gralora_dropout"]
_IS_COMPILED = (
    "prepare_model_for_compiled_hotswap: the model is compiled already, and would be compiled again: call it before"
)


def prepare_model_for_compiled_hotswap(
    model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """PEFT's function, for GraLoRA too: gives all adapters the rank ``target_rank``, before the model is compiled.

    Zeros are put behind the ranks of each block, and B is multiplied so that the outputs stay. The parameters stay the
    same objects.

    Args:
        model: with the adapter that will be replaced.
        target_rank: the largest r of all adapters to come, a multiple of gralora_k; None leaves the ranks.
        config: configurations, or a dictionary of them, whose r becomes ``target_rank``, as does that of the model's.
        check_compiled: ``"error"``, ``"warn"`` or ``"ignore"``: what to do where the model is compiled already.

    Raises:
        ValueError: the model is compiled already, has no adapters, or an adapter does not fit ``target_rank``. The
            model is then as it was.
        RuntimeError: PEFT is older than 0.21.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GraloraLayer)}
    configs = list(config.values()) if isinstance(config, dict) else [config] if config else []
    if layers:
        check_peft("prepare_model_for_compiled_hotswap: GraLoRA needs")
        if target_rank is not None:
            _check_room(layers, target_rank)
    if not layers or any(isinstance(module, LoraLayer) for module in model.modules()):
        loras = {str(i): c for i, c in enumerate(configs) if c.peft_type != PeftType.GRALORA}
        _pefts_prepare(model, target_rank=target_rank, config=loras, check_compiled=check_compiled)
    else:
        _check_not_compiled(model, check_compiled)
    if not layers or target_rank is None:
        return
    for layer in layers.values():
        for adapter in layer.r:
            _pad(layer, adapter, target_rank)
    own = getattr(model, "peft_config", None)
    for each in (*configs, *(own.values() if isinstance(own, dict) else ())):
        if each.peft_type == PeftType.GRALORA:
            each.r = target_rank
            if getattr(each, "rank_pattern", None):
                each.rank_pattern = {}


def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, parameter_prefix: str = "lora_"
) -> None:
    """PEFT's function, for GraLoRA too: puts the weights of ``state_dict`` into the tensors of ``adapter_name``.

    The new adapter may have a smaller r and hybrid_r, another alpha, and fewer layers; its gralora_k is that of the old
    one. Scalings that were changed, by ``set_scale`` say, are again those that alpha and r make.

    Args:
        model: with the adapter; it may be compiled.
        state_dict: as ``hotswap_adapter`` reads it: the names of the model's parameters, with the adapter's name.
        adapter_name: of the adapter that is replaced.
        config: the new adapter's configuration.
        parameter_prefix: for PEFT's function.

    Raises:
        RuntimeError: the new adapter has weights that the model has no place for; or PEFT is older than 0.21.
        ValueError: the adapter is merged, a shape does not fit, or something beside the layers was trained with an adapter
            (modules_to_save, tokens, biases). The model is then as it was.
    """
    if config.peft_type != PeftType.GRALORA:
        _pefts_swap(model, state_dict, adapter_name, config, parameter_prefix)
        return
    check_peft("hotswap_adapter: GraLoRA needs")
    swaps = _planned(model, state_dict, adapter_name, config)
    with torch.no_grad():
        for swap in swaps:
            swap.layer.scaling[adapter_name] = init.scaling(swap.layer, adapter_name)
            for name, parameter in _parameters(swap.layer, adapter_name).items():
                _fill(name, parameter, swap.tensors.get(name), swap.factor)


class _Swap(NamedTuple):
    """What a layer gets: its new tensors by the names of :func:`_parameters`, and by what B is multiplied."""

    layer: Any
    tensors: dict[str, Tensor]
    factor: float


# ---------------------------------------------------------------- a layer's tensors


def _parameters(layer: Any, adapter: str) -> dict[str, Tensor]:
    """The adapter's parameters of a layer by the ends of their names in a state dict."""
    parameters = {f"gralora_{x}.{adapter}": getattr(layer, f"gralora_{x}")[adapter] for x in "AB"}
    if layer.hybrid_r[adapter] > 0:
        for x in "AB":
            parameters[f"gralora_{x}_general.{adapter}.weight"] = getattr(layer, f"gralora_{x}_general")[adapter].weight
    return parameters


def _pad(layer: Any, adapter: str, r: int) -> None:
    if layer.r[adapter] == r:
        return
    before, set_to = init.scaling(layer, adapter), layer.scaling[adapter]
    layer.r[adapter] = r
    after = init.scaling(layer, adapter)
    layer.scaling[adapter] = after * (set_to / before)  # to the bit what a swap finds, where nobody has set it
    for name, parameter in _parameters(layer, adapter).items():
        shape = list(parameter.shape)
        if ".weight" not in name:  # A [k, N/k, r] and B [k, r, M/k]
            shape[2 if name.startswith("gralora_A") else 1] = r
        parameter.data, parameter.grad = _fitted(name, parameter.data, shape, before / after), None


def _fill(name: str, parameter: Tensor, new: Tensor | None, factor: float) -> None:
    """Copies the new tensor into the parameter, which a compiled graph holds; None makes it zero."""
    if new is None:
        parameter.zero_()
    else:
        wide = torch.promote_types(new.dtype, parameter.dtype)  # what is rounded is the parameter, and not the file's B
        parameter.copy_(_fitted(name, new.to(parameter.device, wide), parameter.shape, factor))


def _fitted(name: str, tensor: Tensor, shape: Sequence[int], factor: float) -> Tensor:
    """The tensor with zeros up to ``shape``, behind the ranks of each block or the hybrid part; B times ``factor``."""
    if name.startswith("gralora_B") and factor != 1.0:
        tensor = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor).to(tensor.dtype)
    if ".weight" in name:  # [h, N] or [M, h]
        return nn.functional.pad(tensor, (0, shape[1] - tensor.shape[1], 0, shape[0] - tensor.shape[0]))
    return blocks.padded_A(tensor, shape[2]) if name.startswith("gralora_A") else blocks.padded_B(tensor, shape[1])


# ---------------------------------------------------------------- checks


def _check_not_compiled(model: nn.Module, check: str) -> None:
    if check not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled: expected 'error', 'warn' or 'ignore', got {check!r}")
    if check == "ignore" or not (hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False)):
        return
    if check == "error":
        raise ValueError(_IS_COMPILED)
    warnings.warn(_IS_COMPILED, stacklevel=3)


def _check_room(layers: dict[str, Any], target_rank: int) -> None:
    for name, layer in layers.items():
        for adapter, r in layer.r.items():
            k = layer.gralora_k[adapter]
            if target_rank < r or target_rank % k != 0:
                raise ValueError(
                    f"target_rank: expected a multiple of gralora_k, which is {k}, and at least r, which is {r}, of "
                    f"adapter {adapter!r} in {name}, got {target_rank}"
                )


def _planned(model: nn.Module, state_dict: dict[str, Tensor], adapter: str, config: Any) -> list[_Swap]:
    """What each layer of the adapter gets. Nothing is changed here, and nothing can go wrong afterwards."""
    names: dict[Any, list[str]] = {}  # a layer that is shared has several
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, GraloraLayer) and adapter in module.gralora_A:
            names.setdefault(module, []).append(name.replace("_orig_mod.", ""))  # a compiled module's
    if any(adapter in layer.merged_adapters for layer in names):
        raise ValueError(f"adapter_name: {adapter!r} is merged into the base weights: call unmerge_adapter() first")
    _check_layers_hold_all(model, adapter, config)
    left, swaps = dict(state_dict), []
    for layer, own in names.items():
        found = {each: [left.pop(f"{name}.{each}", None) for name in own] for each in _parameters(layer, adapter)}
        tensors = {each: tensor for each, several in found.items() for tensor in several if tensor is not None}
        swaps.append(_Swap(layer, tensors, _checked(layer, tensors, adapter, config)))
    if left:
        raise RuntimeError(
            f"hotswap_adapter: the new adapter has weights that adapter {adapter!r} of this model has no place for: "
            f"{', '.join(left)}"
        )
    return swaps


def _check_layers_hold_all(model: nn.Module, adapter: str, config: Any) -> None:
    """Whether all that was trained of the old adapter lies in its layers: what lies elsewhere would stay after a swap.

    Raises:
        ValueError: it does not.
    """
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._get_available_adapters():
            raise ValueError(
                f"hotswap_adapter: {name} was trained too (modules_to_save or trainable_token_indices) with adapter {adapter!r}, "
                "and is not swapped: load the new adapter beside it"
            )
    old = getattr(model, "peft_config", {}).get(adapter)
    for which, each in (("loaded", old), ("new", config)):
        if (bias := getattr(each, "bias", "none")) != "none":
            raise ValueError(f"hotswap_adapter: expected bias 'none', got {bias!r} of the {which} adapter")


def _checked(layer: Any, tensors: dict[str, Tensor], adapter: str, config: Any) -> float:
    """The quotient of the new scaling and the layer's own, by which B is to be multiplied.

    Raises:
        ValueError: a tensor does not fit.
    """
    if not tensors:
        return 1.0
    name, k = layer.module_name, layer.gralora_k[adapter]
    if layer.gralora_A[adapter].is_meta:
        raise ValueError(
            f"{name}: the weights of adapter {adapter!r} are on meta, so that none can be put in their place"
        )
    r, h = patterns.rank_of(config, name), config.hybrid_r
    A = tensors.get(f"gralora_A.{adapter}")
    if A is not None and A.shape[0] != k:
        raise ValueError(f"{name}: the new adapter's gralora_k must be the old one's, {k}, but is {A.shape[0]}")
    if r > layer.r[adapter]:
        raise ValueError(
            f"{name}: the new adapter's r is {r}, and the model has room for {layer.r[adapter]}: call "
            f"prepare_model_for_compiled_hotswap(model, target_rank={r}) before the model is compiled"
        )
    if h > layer.hybrid_r[adapter]:
        raise ValueError(
            f"{name}: the new adapter's hybrid_r is {h}, and the model has room for {layer.hybrid_r[adapter]}: load "
            "the adapter with the largest hybrid_r first"
        )
    N, M = layer.in_features, layer.out_features
    shapes: dict[str, tuple[int, ...]] = {
        f"gralora_A.{adapter}": (k, N // k, r),
        f"gralora_B.{adapter}": (k, r, M // k),
    }
    if h > 0:
        shapes |= {f"gralora_A_general.{adapter}.weight": (h, N), f"gralora_B_general.{adapter}.weight": (M, h)}
    got = {each: tuple(tensor.shape) for each, tensor in tensors.items()}
    if got != shapes:
        raise ValueError(f"{name}: the new adapter's weights must be {shapes} by its configuration, but are {got}")
    scaling = init.scaling_for(patterns.alpha_of(config, name), r + h, getattr(config, "use_rslora", False))
    return scaling / init.scaling(layer, adapter)
