# SPDX-License-Identifier: Apache-2.0
"""One adapter for each row of a batch (``adapter_names``), in inference.

Rows are brought into the order of their adapters once, so that those of one adapter are side by side and go through one call; the
output is brought back at the end. A batch that is in order already is neither copied nor brought back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.gralora.layer import GraloraLayer
from torch import Tensor, nn

from .config import check_peft

if TYPE_CHECKING:
    from .layer import GraloraLinear

BASE = "__base__"  # PEFT's name for no adapter


class Group(NamedTuple):
    """Rows ``[first, last)`` of one adapter, in their new order."""

    adapter: str
    first: int
    last: int


class Order(NamedTuple):
    """The rows in the order of their adapters; ``rows`` and ``back`` are None where they are so already."""

    groups: tuple[Group, ...]
    rows: list[int] | None
    back: list[int] | None


@lru_cache(maxsize=64)  # each layer of a model asks for the same
def order_of(adapter_names: tuple[str, ...]) -> Order:
    """By the first row of each adapter."""
    by_adapter: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        by_adapter.setdefault(name, []).append(row)
    groups, rows = [], list[int]()
    for name, own in by_adapter.items():
        groups.append(Group(name, len(rows), len(rows) + len(own)))
        rows += own
    if rows == sorted(rows):
        return Order(tuple(groups), None, None)
    back = [0] * len(rows)
    for place, row in enumerate(rows):
        back[row] = place
    return Order(tuple(groups), rows, back)


def forward(layer: GraloraLinear, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output with an adapter for each row of x; a row whose adapter the layer does not have gets the base layer's.

    Raises:
        ValueError: there are not as many names as rows, or an adapter is merged.
    """
    if len(x) != len(adapter_names):
        raise ValueError(f"adapter_names: expected a name for each of {len(x)} rows, got {len(adapter_names)}")
    if layer.merged:
        raise ValueError(
            f"adapter_names: the layer holds merged adapters ({', '.join(layer.merged_adapters)}): call unmerge_adapter() first"
        )
    result = layer.base_layer(x, *args, **kwargs)
    if layer.disable_adapters:
        return result
    order = order_of(tuple(adapter_names))
    if order.rows is not None:
        x, result = x[order.rows], result[order.rows]
    parts = [
        layer.add_path(name, x[first:last], result[first:last], in_place=False)
        if name in layer.gralora_A
        else result[first:last]
        for name, first, last in order.groups
    ]
    y = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else result
    return (y if order.back is None else y[order.back]).to(x.dtype)


@contextmanager
def hooks(model: nn.Module, adapter_names: Sequence[str] | None, num_beams: int | None) -> Iterator[None]:
    """While it is open, all layers of the tuner ``model`` get ``adapter_names``; None: nothing is done.

    Beams repeat the rows of a batch in the decoder, so they repeat the names there. What is trained beside the layers, such as
    ``modules_to_save``, gets them too.

    Raises:
        ValueError: the model is in training mode, or no layer has an adapter of one of the names.
        TypeError: ``adapter_names`` is no list of texts.
        RuntimeError: PEFT is too old.
    """
    if adapter_names is None:
        yield
        return
    _check_names(model, adapter_names)
    from peft.tuners.lora.model import _get_encoder
    from peft.utils.other import AuxiliaryTrainingWrapper

    beams = num_beams if isinstance(num_beams, int) else 1
    repeated = [name for name in adapter_names for _ in range(beams)]
    encoder = _get_encoder(model.model) if beams > 1 else None
    in_encoder = set() if encoder is None else set(encoder.modules())
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (GraloraLayer, AuxiliaryTrainingWrapper)):
                names = list(adapter_names) if module in in_encoder else repeated
                if isinstance(module, AuxiliaryTrainingWrapper):  # which knows its own adapters alone
                    own = module._get_available_adapters()
                    names = [name if name in own else BASE for name in names]
                handle = module.register_forward_pre_hook(partial(_give_names, names=names), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _check_names(model: nn.Module, adapter_names: Sequence[str]) -> None:
    if model.training:
        raise ValueError(
            "adapter_names: expected a model in evaluation mode, got one in training: call model.eval() first"
        )
    check_peft("adapter_names: mixed batches need")
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names: expected a list of names, one for each row, got {adapter_names!r}")
    there = {name for layer in model.modules() if isinstance(layer, GraloraLayer) for name in layer.gralora_A}
    unknown = sorted(set(adapter_names) - there - {BASE})
    if unknown:
        raise ValueError(
            f"adapter_names: there is no adapter {', '.join(unknown)}: the model has {', '.join(sorted(there))}"
        )


def _give_names(_: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
