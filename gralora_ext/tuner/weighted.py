# SPDX-License-Identifier: Apache-2.0
"""A new adapter made of others: what each layer gets, and the configuration with which it saves and loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from peft.tuners.gralora import GraloraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from . import combine, patterns
from .combine import BY_SVD, TASK_ARITHMETIC, Svd, Term, Weights
from .config import GraloraConfig, PeftsConfig, check_peft


class Combination(NamedTuple):
    """What is asked for: LoRA's arguments of the same names."""

    adapters: list[str]
    weights: list[float]
    kind: str
    svd_rank: int | None
    svd: Svd
    merge: Callable[..., Tensor] | None  # None for "cat"


def add(tuner: Any, name: str, adapters: list[str], weights: list[float], kind: str, **options: Any) -> None:
    """Adds the adapter to ``tuner``; see :meth:`gralora_ext.GraloraModel.add_weighted_adapter`.

    All tensors are made before the model is touched, so that an error leaves it as it was.
    """
    if name in tuner.peft_config:
        return  # as LoRA does
    check_peft("add_weighted_adapter needs")
    what = _checked(tuner, adapters, weights, kind, **options)
    layers = {
        layer.module_name: layer
        for layer in tuner.model.modules()
        if isinstance(layer, GraloraLayer) and any(adapter in layer.gralora_A for adapter in adapters)
    }
    if not layers:
        raise ValueError(f"adapters: no layer has any of {adapters}, so there is nothing to combine")
    tensors = {each: _combined(tuner.peft_config, each, layer, what) for each, layer in layers.items()}
    tuner.peft_config[name] = _configuration(tuner.peft_config, adapters, tensors)
    try:
        tuner.inject_adapter(tuner.model, name)
        for each, layer in layers.items():
            if name not in layer.gralora_A:
                raise ValueError(
                    f"adapters: one of them adapts {each}, and another has trained a copy of it whole (modules_to_save): "
                    "these are not combined"
                )
            _put(layer, name, tensors[each])
        for wrapper in _saved_modules(tuner):
            for owner in set(adapters) & set(wrapper.modules_to_save):
                copied = wrapper.modules_to_save[name].requires_grad_(False)
                copied.load_state_dict(wrapper.modules_to_save[owner].state_dict())
    except BaseException:
        tuner.delete_adapter(name)
        raise


def _put(layer: Any, name: str, tensors: Weights) -> None:
    parameters = [layer.gralora_A[name], layer.gralora_B[name]]
    if tensors.A_general is not None:
        parameters += [layer.gralora_A_general[name].weight, layer.gralora_B_general[name].weight]
    for parameter, tensor in zip(parameters, (t for t in tensors if t is not None), strict=True):
        parameter.data = tensor.contiguous()
        parameter.requires_grad_(False)
    # PEFT makes a new dropout in training mode, even where the model is evaluated.
    layer.gralora_dropout[name].train(layer.training)


# ---------------------------------------------------------------- checks


def _checked(
    tuner: Any,
    adapters: list[str],
    weights: list[float],
    kind: str,
    svd_rank: int | None,
    svd: Svd,
    density: float | None,
    majority_sign_method: str,
) -> Combination:
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise ValueError(f"adapters: {adapter!r} does not exist, expected some of {list(tuner.peft_config)}")
    if not adapters:
        raise ValueError("adapters: expected the names of one or more, got none")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: expected one for each of {len(adapters)} adapters, got {len(weights)}")
    for adapter in adapters:
        if getattr(tuner.peft_config[adapter], "trainable_token_indices", None):
            raise ValueError(
                f"adapters: {adapter!r} has trained tokens (trainable_token_indices), which are not combined"
            )
        if tuner.peft_config[adapter].bias != "none":
            raise ValueError(
                f"adapters: {adapter!r} has trained biases (bias={tuner.peft_config[adapter].bias!r}), which are not "
                "combined"
            )
    shared = [w for w in _saved_modules(tuner) if sum(adapter in w.modules_to_save for adapter in set(adapters)) > 1]
    if shared:
        raise ValueError(
            "adapters: more than one of them has trained a copy of the same module (modules_to_save), "
            f"{len(shared)} in all: such copies are not combined"
        )
    kinds = ("cat", *TASK_ARITHMETIC, *BY_SVD)
    if kind not in kinds:
        raise ValueError(f"combination_type: expected one of {', '.join(kinds)}, got {kind!r}")
    if len(adapters) == 1:
        kind = "linear"  # as LoRA does
    if svd_rank is not None and svd_rank < 1:
        raise ValueError(f"svd_rank: expected a positive integer, got {svd_rank}")
    if kind not in ("cat", "linear", "svd") and (density is None or not 0 <= density <= 1):
        raise ValueError(f"density: expected a number from 0 to 1 for combination_type {kind!r}, got {density}")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method: expected 'total' or 'frequency', got {majority_sign_method!r}")
    if len({type(tuner.peft_config[adapter].target_modules) for adapter in adapters}) > 1:
        raise ValueError(
            "adapters: the target_modules of some are a text and those of others a list, expected one kind"
        )
    merge = None if kind == "cat" else combine.merge_function(kind, density, majority_sign_method)
    return Combination(adapters, weights, kind, svd_rank, svd, merge)


def _saved_modules(tuner: Any) -> list[ModulesToSaveWrapper]:
    return [module for module in tuner.model.modules() if isinstance(module, ModulesToSaveWrapper)]


# ---------------------------------------------------------------- a layer


def _combined(configs: dict[str, Any], name: str, layer: Any, what: Combination) -> Weights:
    """The new adapter's tensors for a layer that has one or more of the adapters.

    An adapter that is not in this layer counts with the rank that it would have, so that layers have the same r where
    the configurations say so; r/k is rounded up.
    """
    present = [
        (adapter, weight)
        for adapter, weight in zip(what.adapters, what.weights, strict=True)
        if adapter in layer.gralora_A
    ]
    ks = {adapter: layer.gralora_k[adapter] for adapter, _ in present}
    k = next(iter(ks.values()))
    if what.kind not in BY_SVD and len(set(ks.values())) > 1:
        raise ValueError(
            f"{name}: the gralora_k of all adapters must agree for combination_type {what.kind!r}, but are {ks}: "
            "use 'svd'"
        )
    ranks = [layer.r.get(adapter, patterns.rank_of(configs[adapter], name)) for adapter in what.adapters]
    hybrid = [configs[adapter].hybrid_r for adapter in what.adapters]
    terms = [Term(weights_of(layer, adapter), layer.scaling[adapter], weight) for adapter, weight in present]
    if what.merge is None:
        return combine.concatenated(terms, _multiple_of(k, *ranks), sum(hybrid))
    if what.kind in TASK_ARITHMETIC:
        if len(set(ranks)) > 1 or len(set(hybrid)) > 1:
            raise ValueError(
                f"{name}: r and hybrid_r of all adapters must agree for combination_type {what.kind!r}, but r are "
                f"{ranks} and hybrid_r {hybrid}: use 'cat' or 'svd'"
            )
        return combine.task_arithmetic(terms, what.merge)
    if what.svd_rank is not None and what.svd_rank % k != 0:
        raise ValueError(f"svd_rank: expected a multiple of gralora_k, which is {k} in {name}, got {what.svd_rank}")
    largest = max(r + h for r, h in zip(ranks, hybrid, strict=True))
    return combine.decomposed(terms, what.svd_rank or _multiple_of(k, largest), what.merge, what.svd)


def _multiple_of(k: int, *ranks: int) -> int:
    return k * sum(-(-rank // k) for rank in ranks)


def weights_of(layer: Any, adapter: str) -> Weights:
    """The tensors of an adapter of a layer, PEFT's own or ours.

    Raises:
        ValueError: they are on meta, as where accelerate keeps them in other memory.
    """
    A, B = layer.gralora_A[adapter].detach(), layer.gralora_B[adapter].detach()
    if A.is_meta:
        raise ValueError(f"{layer.module_name}: the weights of adapter {adapter!r} are on meta: load them first")
    if layer.hybrid_r[adapter] == 0:
        return Weights(A, B, None, None)
    general = (layer.gralora_A_general[adapter].weight, layer.gralora_B_general[adapter].weight)
    return Weights(A, B, *(weight.detach() for weight in general))


# ---------------------------------------------------------------- the configuration


def _configuration(configs: dict[str, Any], adapters: list[str], tensors: dict[str, Weights]) -> GraloraConfig:
    """That of the first adapter, but with what was made; alpha is r + hybrid_r, so that the scaling is 1."""
    first = {f.name: getattr(configs[adapters[0]], f.name) for f in fields(PeftsConfig) if f.init}
    some = next(iter(tensors.values()))
    h = 0 if some.A_general is None else some.A_general.shape[0]
    r, rank_pattern = patterns.common_and_others({name: t.A.shape[2] for name, t in tensors.items()})
    k, k_pattern = patterns.common_and_others({name: t.A.shape[0] for name, t in tensors.items()}, divides=r)
    changed = {
        "r": r,
        "hybrid_r": h,
        "alpha": r + h,
        "gralora_k": k,
        "target_modules": _targets(configs, adapters, tensors),
        "modules_to_save": sorted({n for a in adapters for n in configs[a].modules_to_save or ()}) or None,
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": "none",
    }
    # Our fields are set afterwards: PEFT's own class may be what PEFT looks up now.
    config = GraloraConfig(**{**first, **changed})
    config.k_pattern, config.rank_pattern = k_pattern, rank_pattern
    config.alpha_pattern = {name: rank + h for name, rank in rank_pattern.items()}
    config.ensure_weight_tying = any(getattr(configs[a], "ensure_weight_tying", False) for a in adapters)
    return config


def _targets(configs: dict[str, Any], adapters: list[str], layers: dict[str, Any]) -> set[str] | str:
    """The modules of all adapters together; by their full names, where a configuration takes some of them out again."""
    chosen = [configs[adapter] for adapter in adapters]
    if any(getattr(c, "exclude_modules", None) or c.layers_to_transform is not None for c in chosen):
        return "|".join(f"({re.escape(name)})" for name in layers)
    if isinstance(chosen[0].target_modules, str):
        return "|".join(f"({config.target_modules})" for config in chosen)
    return reduce(or_, (set(config.target_modules) for config in chosen))
