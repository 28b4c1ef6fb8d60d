# SPDX-License-Identifier: Apache-2.0
"""All that :func:`gralora_ext.enable` replaces in PEFT: entries of dictionaries that PEFT reads when it is called.

And what it sets of our own for the layers that are built from then on. One thing stays in PEFT, whether enabled or not: its own tuner
refuses a configuration of ours that it would misread.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftType, helpers
from peft.tuners import gralora as stock
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import conversion as pefts_conversion
from peft.utils import hotswap as pefts_hotswap

from . import convert, hotswap
from .config import GraloraConfig, PeftsConfig
from .model import NEW_LAYERS, GraloraModel

_ABSENT = object()


class Entry(NamedTuple):
    """A key of a dictionary of PEFT's, with its value there and with ours."""

    where: dict[Any, Any]
    key: Any
    pefts: Any
    ours: Any


_CLASSES = [
    Entry(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.GRALORA, stock.GraloraModel, GraloraModel),
    Entry(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.GRALORA, PeftsConfig, GraloraConfig),
]
_ENTRIES = [
    *_CLASSES,
    # rescale_adapter_scale asks for instances of it, and works with any layer that has scalings.
    Entry(vars(helpers), "LoraLayer", LoraLayer, (LoraLayer, stock.GraloraLayer)),
    # convert_to_lora calls it for each layer, whenever it was imported.
    Entry(
        vars(pefts_conversion),
        "_convert_module_to_lora",
        pefts_conversion._convert_module_to_lora,
        convert.module_to_lora,
    ),
    # hotswap_adapter reads what it needs here, whenever it was imported.
    Entry(pefts_hotswap.CONFIG_KEYS_TO_CHECK, PeftType.GRALORA, _ABSENT, hotswap.SAME_IN_BOTH),
    *(
        Entry(vars(pefts_hotswap), function.__name__, getattr(pefts_hotswap, function.__name__), function)
        for function in (hotswap.hotswap_adapter_from_state_dict, hotswap.prepare_model_for_compiled_hotswap)
    ),
    Entry(NEW_LAYERS, "exact_unmerge", True, True),
]

InUse = tuple[Any, ...]  # a value for each entry


def ours(exact_unmerge: bool) -> InUse:
    """What :func:`install` puts in use."""
    return tuple(exact_unmerge if entry.where is NEW_LAYERS else entry.ours for entry in _ENTRIES)


def install(values: InUse) -> InUse:
    """Makes ``values`` those that PEFT looks up, and returns those before them."""
    previous = _in_use()
    for entry, value in zip(_ENTRIES, values, strict=True):
        if value is _ABSENT:
            entry.where.pop(entry.key, None)
        else:
            entry.where[entry.key] = value
    return previous


def remove() -> None:
    """Puts PEFT's own back where ours are; what is somebody else's stays."""
    now = zip(_ENTRIES, _in_use(), strict=True)
    install(tuple(e.pefts if value is e.ours or e.where is NEW_LAYERS else value for e, value in now))


def is_enabled() -> bool:
    """Whether PEFT builds fused layers now."""
    return all(entry.where.get(entry.key) is entry.ours for entry in _CLASSES)


def _in_use() -> InUse:
    return tuple(entry.where.get(entry.key, _ABSENT) for entry in _ENTRIES)


_check_new = stock.GraloraModel._check_new_adapter_config


def _refuse_what_is_misread(self: Any, config: Any) -> None:
    """PEFT's check of each new adapter, which asks before for fields of ours that its own tuner drops in silence."""
    if isinstance(config, GraloraConfig) and not isinstance(self, GraloraModel) and (names := config.misread()):
        raise ValueError(
            f"{', '.join(names)}: this model was built by PEFT's own tuner, which would ignore that and compute other numbers: "
            "call gralora_ext.enable() before the model is built, or gralora_ext.accelerate(model)"
        )
    _check_new(self, config)


stock.GraloraModel._check_new_adapter_config = _refuse_what_is_misread
