# SPDX-License-Identifier: Apache-2.0
"""Merging and unmerging a whole model: all of its layers, or none.

While it lasts, each layer notes in its journal what takes its changes back (``exact.py``); where the work is broken off,
by an error or by Ctrl-C, this is done, layer by layer, the last first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from peft.tuners.gralora import GraloraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn

from . import exact, quantized
from .layer import GraloraLinear, inexact
from .uninterrupted import Uninterrupted

Result = TypeVar("Result")


def check_names(adapter_names: Any, known: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a name in the list ``adapter_names`` is not ``known``.
    """
    if adapter_names is None or isinstance(adapter_names, str):  # which PEFT refuses
        return
    names = list(known)
    for name in adapter_names:
        if name not in names:
            raise ValueError(f"adapter_names: the model has no adapter {name!r}; it has {', '.join(map(repr, names))}")


def all_or_nothing(model: nn.Module, work: Callable[[], Result], last_first: bool = False) -> Result:
    """``work()``, after which the adapter layers of ``model`` are merged or not; where it raises, all is as before.

    That is each weight, bit for bit, what is merged into it, and what the modules of ``model`` are. ``last_first`` says in which
    order the work goes over the layers: they are put back in the opposite one, since some may share a weight.
    """
    before = [_before(module) for module in model.modules() if isinstance(module, BaseTunerLayer)]
    tree = [(module, dict(module._modules)) for module in model.modules()]
    peft_config = vars(model).get("peft_config")
    config = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    try:
        for layer in before:
            layer.begin()
        result = work()
        for layer in before:
            layer.end()
        return result
    except BaseException:
        with Uninterrupted():
            for module, children in tree:
                module._modules.clear()
                module._modules.update(children)
            if peft_config is not None:
                vars(model)["peft_config"] = peft_config
            if getattr(config, "tie_word_embeddings", None) is not tied:
                config.tie_word_embeddings = tied  # type: ignore[union-attr]
            _put_back(before if last_first else before[::-1])
        raise


def _put_back(layers: Sequence[_Before]) -> None:
    """Restores the layers in this order. One that cannot be restored, for want of memory, is tried again after the others.

    Raises:
        RuntimeError: some layers could not be restored.
    """
    left, errors = list(layers), list[Exception]()
    while left:
        failed, stuck = list[_Before](), set[int]()
        for layer in left:
            weight = id(getattr(layer.layer.get_base_layer(), "weight", layer))
            try:
                if weight in stuck:  # what was done to it after this layer is not undone yet
                    failed.append(layer)
                    continue
                with onload_layer(layer.layer):
                    layer.restore()
            except Exception as error:  # noqa: BLE001  whatever it is, the others are put back too
                errors.append(error)
                failed.append(layer)
                stuck.add(weight)
            else:
                layer.end()
        if len(failed) == len(left):
            for layer in failed:
                layer.end()
            raise RuntimeError(
                f"{len(failed)} of the layers could not be put back after an error, so that the model is merged in part: load it again"
            ) from errors[0]
        left = failed


def unmerge(model: nn.Module) -> None:
    """Takes the merged adapters off all layers of ``model``, the last first: layers may share a weight."""
    reasons: list[str] = []

    def work() -> None:
        for module in reversed([m for m in model.modules() if isinstance(m, BaseTunerLayer)]):
            with onload_layer(module):
                if isinstance(module, GraloraLinear) and module.merged:
                    reason = module.take_off()
                    if reason is not None:
                        reasons.append(f"the base weight of {module.module_name} {reason}")
                else:
                    module.unmerge()

    all_or_nothing(model, work, last_first=True)
    if reasons:
        others = f" (and so for {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        warnings.warn(inexact(reasons[0] + others), stacklevel=3)


def unmerge_before_adding(model: nn.Module) -> None:
    """Takes merged adapters off, as PEFT does while it adds one. What undoes a failed addition restores no weights."""
    if any(isinstance(module, GraloraLayer) and module.merged for module in model.modules()):
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
        unmerge(model)


class _Before:
    """What a layer was, and what puts it back."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.merged = layer, list(layer.merged_adapters)

    def begin(self) -> None:
        pass

    def restore(self) -> None:
        self.layer.merged_adapters[:] = self.merged

    def end(self) -> None:
        pass


class _Ours(_Before):
    """Of a fused layer over a weight that is not quantized; its journal has the merges in the order in which they began."""

    def __init__(self, layer: GraloraLinear) -> None:
        super().__init__(layer)
        self.kept, self.journal = layer.kept_merge, list[exact.Kept]()

    def begin(self) -> None:
        self.layer.journal = self.journal

    def restore(self) -> None:
        exact.put_back(self.layer.get_base_layer().weight, self.journal, self.kept)
        self.journal.clear()  # its codes are memory that the next layer may need
        self.layer.kept_merge = self.kept
        super().restore()

    def end(self) -> None:
        self.layer.journal = None


class _Quantized(_Before):
    """Of a fused layer over a quantized weight, which a merge replaces and never writes into."""

    def __init__(self, layer: GraloraLinear) -> None:
        super().__init__(layer)
        self.contents = quantized.contents(layer.get_base_layer())
        self.kept, self.errors = layer.kept_weight, layer.merge_errors

    def restore(self) -> None:
        quantized.put_back(self.contents)
        self.layer.kept_weight, self.layer.merge_errors = self.kept, self.errors
        super().restore()


class _Other(_Before):
    """Of a layer that is not ours: of tokens that are trained, or one that accelerate() has skipped. It is copied."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.weight = layer.get_base_layer().weight
        self.data = self.weight.data
        self.copy = self.data.clone()

    def restore(self) -> None:
        self.data.copy_(self.copy)
        self.weight.data = self.data
        super().restore()


def _before(layer: Any) -> _Before:
    if not isinstance(layer, GraloraLinear):
        return _Other(layer) if hasattr(layer.get_base_layer(), "weight") else _Before(layer)
    return _Quantized(layer) if layer.quantization_backend is not None else _Ours(layer)
