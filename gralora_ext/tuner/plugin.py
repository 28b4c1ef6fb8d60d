# SPDX-License-Identifier: Apache-2.0
"""Putting the fused tuner in and out of use: for the models PEFT is going to build, and for those it has built."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType, TracebackType
from typing import final

from peft.tuners import gralora as stock
from peft.tuners.gralora.layer import Linear
from torch import nn

from . import patches, quantized
from .config import GraloraConfig
from .layer import GraloraLinear
from .model import GraloraModel
from .patches import InUse


@final
class Activation:
    """What :func:`enable` returns. Leaving a ``with`` block over it puts back the tuner that was there before."""

    def __init__(self, exact_unmerge: bool) -> None:
        self._ours = patches.ours(exact_unmerge)
        self._before_call: InUse | None = patches.install(self._ours)
        self._before_block: list[InUse] = []

    def __enter__(self) -> Activation:
        # `with enable():` has already displaced the earlier tuner in the call; an object used again
        # has not.
        previous = patches.install(self._ours)
        if previous == self._ours and self._before_call is not None:
            previous = self._before_call
        self._before_call = None
        self._before_block.append(previous)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        patches.install(self._before_block.pop())


def enable(*, exact_unmerge: bool = True) -> Activation:
    """From here on PEFT builds fused layers for ``GraloraConfig``, in this process; models already built stay as they are.

    It also reads configurations as :class:`gralora_ext.GraloraConfig`, which has more fields; PEFT's own class goes on
    working. And PEFT's functions for hot-swapping and rescaling, which know LoRA alone, take GraLoRA too
    (``patches.py``).

    Args:
        exact_unmerge: whether layers that are built from here on unmerge to the bits of before: a merge keeps for that a byte for
            each weight, at most a tenth of one more, and a copy of the adapter, or a copy of the weight where bytes do not do, until
            it is taken off. False: it keeps nothing, and unmerging is exact up to rounding. ``layer.exact_unmerge`` is the
            same for one layer.

    Calling it again changes nothing but that. ``with gralora_ext.enable():`` limits it to a block (blocks may be nested): at its
    end the tuner of before the block is back. Models built inside keep their fused layers.
    """
    return Activation(exact_unmerge)


def disable() -> None:
    """From here on PEFT builds its own GraLoRA layers again; models already built stay as they are."""
    patches.remove()


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`accelerate` or :func:`restore` did.

    Attributes:
        converted: the number of layers whose class was changed.
        skipped: ``(module name, reason)`` of each GraLoRA layer left as it was.
    """

    converted: int
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __repr__(self) -> str:
        lines = [f"{self.converted} GraLoRA layers converted, {len(self.skipped)} skipped"]
        return "\n".join(lines + [f"  {name or '(the model itself)'}: {reason}" for name, reason in self.skipped])


def accelerate(model: nn.Module) -> Report:
    """Turns the GraLoRA layers that PEFT built in ``model`` into fused ones, in place.

    Parameters, optimizer state, hooks, merged and active adapters and state_dict keys stay. Adapters that a PeftModel is given
    later are fused too; those that ``inject_adapter_in_model`` adds later are not, without :func:`enable`. Layers that are fused
    already count neither as converted nor as skipped, so a second call reports 0. The base layers may be quantized. Skipped, with
    the reason: subclasses of PEFT's layer, and layers whose forward or dropout is not PEFT's.

    Args:
        model: a PeftModel, a model after ``inject_adapter_in_model``, or any module that holds such a model.

    Raises:
        TypeError: ``model`` is not a module.
    """
    report = _convert(model, Linear, GraloraLinear, stock.GraloraModel, GraloraModel)
    quantized.prepare(model)
    return report


def restore(model: nn.Module) -> Report:
    """Turns the fused layers of ``model`` into PEFT's own ones, in place: :func:`accelerate` undone.

    It does so with every fused layer, also one built after :func:`enable`. Skipped, with the reason, are layers where PEFT's
    would do something else in silence: with an adapter whose configuration has fields that change the numbers and that PEFT
    lacks (``config.CHANGES_NUMBERS``), and over a quantized base. Args, raises: as :func:`accelerate`.
    """
    report = _convert(model, GraloraLinear, Linear, GraloraModel, stock.GraloraModel)
    if not any(isinstance(module, GraloraLinear) for module in model.modules()):
        quantized.release(model)
    return report


def _convert(
    model: nn.Module, source: type[Linear], target: type[Linear], source_tuner: type, target_tuner: type
) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    beyond_peft = _fields_beyond_peft(model) if target is Linear else {}
    converted, skipped = 0, list[tuple[str, str]]()
    for name, module in model.named_modules():
        fields = beyond_peft.get(module, {})
        if type(module) is source_tuner and not any(fields.values()):
            module.__class__ = target_tuner
        elif isinstance(module, stock.GraloraLayer) and type(module) is not target:
            reason = _obstacle(module, source) or _needs_ours(module, target, fields)
            if reason:
                skipped.append((name, reason))
            else:
                _change_class(module, source, target)
                converted += 1
    return Report(converted, skipped)


def _obstacle(module: Linear, source: type[Linear]) -> str | None:
    """Why the class of ``module`` may not be changed from ``source``, or None where it may."""
    if type(module) is not source:
        return f"its class {type(module).__qualname__} is not {source.__module__}.{source.__qualname__} itself"
    if getattr(module, "kept_weight", None):
        return "adapters are merged into its quantized base layer: unmerge them first"
    if getattr(module, "kept_merge", None) is not None:
        return (
            "adapters are merged into it that it takes off bit for bit, and PEFT's layer would not: unmerge them first"
        )
    if not hasattr(module.get_base_layer(), "weight"):
        return f"its base layer {type(module.get_base_layer()).__qualname__} has no weight"
    unknown = [d for d in module.gralora_dropout.values() if type(d) not in (nn.Dropout, nn.Identity)]
    if unknown:
        return f"its dropout is a {type(unknown[0]).__qualname__}, not torch.nn.Dropout"
    if "forward" in vars(module) and not _instance_forwards(module, source):
        return f"its forward has been replaced by {vars(module)['forward']!r}"
    return None


def _needs_ours(module: Linear, target: type[Linear], beyond_peft: dict[str, str]) -> str | None:
    """Why PEFT's layer would do something else than ``module`` without a word, or None where it would not."""
    if target is not Linear:
        return None
    if getattr(module, "quantization_backend", None) is not None:
        return f"its base layer {type(module.get_base_layer()).__qualname__} is quantized, and PEFT's layer cannot merge into it"
    for adapter in module.gralora_A:
        if beyond_peft.get(adapter):
            return f"adapter {adapter!r} has {beyond_peft[adapter]}, which PEFT's GraLoRA does not know"
    return None


def _fields_beyond_peft(model: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """By module and adapter, the fields of its configuration that change what PEFT's tuner would make of it, or "".

    Models in one container may have other adapters of the same name: the innermost configuration around a module is its own.
    """
    found: dict[nn.Module, dict[str, str]] = {}
    for holder in model.modules():
        configs = getattr(holder, "peft_config", None)
        if isinstance(configs, dict):
            own = {n: ", ".join(c.marks()) if isinstance(c, GraloraConfig) else "" for n, c in configs.items()}
            for module in holder.modules():
                found[module] = {**found.get(module, {}), **own}
    return found


def _instance_forwards(module: Linear, source: type[Linear]) -> list[str]:
    """The attributes of the instance that hold ``source``'s forward, bound to it.

    Accelerate's hooks put it into ``_old_forward`` and their own function into ``forward``; their removal leaves it in
    ``forward``. A change of class alone would not reach either.
    """
    attributes = ((name, vars(module).get(name)) for name in ("forward", "_old_forward"))
    return [name for name, value in attributes if getattr(value, "__func__", None) is source.forward]


def _change_class(module: Linear, source: type[Linear], target: type[Linear]) -> None:
    for name in _instance_forwards(module, source):
        setattr(module, name, MethodType(target.forward, module))
    module.__class__ = target
