# SPDX-License-Identifier: Apache-2.0
"""What the configuration says of one layer: its r, alpha and k."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Collection
from typing import Any

from peft.tuners.gralora import GraloraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from .._gralora_k import CHOICES, nearest_k
from .config import GraloraConfig, check_init_weights


def of_layer(config: Any, name: str, layer: nn.Module) -> Any:
    """``config`` with the r, alpha and gralora_k of the layer of that name; ``config`` itself where they are its own.

    Raises:
        ValueError: r is not divisible by k, no k can be chosen, or what a pattern says depends on the order of its keys.
    """
    check_init_weights(config)
    if not isinstance(config, GraloraConfig):
        return config  # PEFT's own
    _check_order(config, name)
    r, alpha = rank_of(config, name), alpha_of(config, name)
    k = _matching(config.k_pattern, name, config.gralora_k)
    if k == "auto":
        k = choose_k(r, *_features(layer))
    if r % k != 0:
        raise ValueError(f"{name}: r must be divisible by gralora_k, but r is {r} and gralora_k is {k} there")
    if (r, alpha, k) == (config.r, config.alpha, config.gralora_k):
        return config
    own = copy.copy(config)
    own.r, own.alpha, own.gralora_k = r, alpha, k
    return own


def rank_of(config: Any, name: str) -> int:
    """The r that a configuration, ours or PEFT's own, gives the layer of that name."""
    return _matching(getattr(config, "rank_pattern", {}), name, config.r)


def alpha_of(config: Any, name: str) -> float:
    """The alpha that a configuration, ours or PEFT's own, gives the layer of that name."""
    return _matching(getattr(config, "alpha_pattern", {}), name, config.alpha)


def choose_k(r: int, in_features: int, out_features: int) -> int:
    """The k of 1, 2, 4 and 8 that divides all three and brings r/k² nearest to 8."""
    possible = [k for k in CHOICES if r % k == in_features % k == out_features % k == 0]
    return nearest_k(r, possible)


def store_chosen_k(config: Any, adapter: str, model: nn.Module) -> None:
    """Puts the k that ``"auto"`` has chosen for the layers of ``model`` in its place: the commonest, and the others by name."""
    if not isinstance(config, GraloraConfig) or config.gralora_k != "auto":
        return
    chosen = _ks(adapter, model)
    if not chosen:
        config.gralora_k = CHOICES[0]
        return
    own = {name for name in chosen if _matching(config.k_pattern, name, None) is not None}
    config.gralora_k, exceptions = common_and_others(chosen, but=own, divides=config.r)
    config.k_pattern = {**config.k_pattern, **exceptions}


def warn_of_unmatched(config: Any, adapter: str, model: nn.Module) -> None:
    """Warns of keys of ``k_pattern`` that match no layer of the adapter, as PEFT does of the other patterns' keys."""
    names, keys = _ks(adapter, model), getattr(config, "k_pattern", {})
    unmatched = sorted(key for key in keys if not any(get_pattern_key([key], name) == key for name in names))
    if unmatched:
        warnings.warn(
            f"The following k_pattern keys did not match any targeted module and were ignored: {unmatched}.",
            RuntimeWarning,
            stacklevel=3,
        )


def _ks(adapter: str, model: nn.Module) -> dict[str, int]:
    """The k of each layer of the adapter, by the layer's name."""
    return {
        name: layer.gralora_k[adapter]
        for name, layer in model.named_modules()
        if isinstance(layer, GraloraLayer) and adapter in layer.gralora_k
    }


def common_and_others(
    values: dict[str, Any], but: Collection[str] = (), divides: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """The commonest of the values of layers, and a pattern for the layers with another, except those in ``but``.

    With ``divides`` it is the commonest of those that divide that number, or 1: no configuration is read whose k does not
    divide its r, whatever the patterns say.
    """
    possible = Counter(v for v in values.values() if divides is None or divides % v == 0) or Counter([1])
    ((common, _),) = possible.most_common(1)
    return common, {f"^{re.escape(name)}": v for name, v in values.items() if v != common and name not in but}


def _check_order(config: GraloraConfig, name: str) -> None:
    """The first key that matches is what counts, and PEFT sorts the keys when it writes them."""
    for field in ("rank_pattern", "alpha_pattern", "k_pattern"):
        pattern = getattr(config, field)
        now, loaded = get_pattern_key(pattern, name), get_pattern_key(sorted(pattern), name)
        if pattern.get(now) != pattern.get(loaded):
            raise ValueError(
                f"{field}: {now!r} and {loaded!r} both match {name}, with different values, and the file of the adapter "
                "does not keep the order of keys: make them exclude each other"
            )


def _matching(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return pattern.get(get_pattern_key(pattern.keys(), name), default)


def _features(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, GraloraLayer):
        return layer.in_features, layer.out_features
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if isinstance(base, Conv1D):
        rows, columns = getattr(base.weight, "ds_shape", base.weight.shape)
        return rows, columns
    return base.in_features, base.out_features
