# SPDX-License-Identifier: Apache-2.0
"""Merges that are taken off again bit for bit, without a copy of the weight.

A merge makes ``W' = round(W + dW)``, and ``V = round(W' - dW)`` is the way back as arithmetic finds it: near W, but seldom W.
A code of one byte for each weight says how many units in the last place lie between V and W; a list has those that no byte
holds. Codes are against the weight of before the first merge, for the sum of all adapters that are merged. The adapters and
their scalings are kept as they were, since the layer's own may be trained, rescaled or deleted meanwhile.

Where the list would take more than a tenth of a byte for each weight, the weight is copied instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import kernels, ops
from .._loader import load
from .uninterrupted import Uninterrupted

if TYPE_CHECKING:
    from .layer import GraloraLinear

_native = load()
_ops = torch.ops.gralora_ext
DONE, BEFORE, AFTER, LISTED, FIRST_NOT_FINITE, FACTS = range(6)  # as in csrc/coded_ops.cpp
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Operands(NamedTuple):
    """An adapter as it was merged."""

    name: str
    A: Tensor
    B: Tensor
    A_general: Tensor | None
    B_general: Tensor | None
    scaling: float

    def taken_off(self, device: torch.device) -> Operands:
        """What subtracts this adapter from a weight on ``device``."""
        if device.type == "meta" != self.A.device.type:
            refuse_device("the base weight", device, self.name, self.A)
        tensors = (None if t is None else t.to(device) for t in self[1:5])
        return Operands._make((self.name, *tensors, -self.scaling))


def operands_of(layer: GraloraLinear, name: str) -> Operands:
    """A copy of the adapter as it is now."""
    tensors = (None if t is None else t.detach().clone() for t in layer._weights(name))
    return Operands._make((name, *tensors, layer.scaling[name]))


def add(weight: Tensor, o: Operands, fan_in_fan_out: bool) -> None:
    """Merges one adapter into ``weight``, without codes."""
    if kernels.can_take(weight):
        _native.merge_into(weight, o.A, o.B, o.A_general, o.B_general, o.scaling, fan_in_fan_out)
    else:
        general = {"A_general": o.A_general, "B_general": o.B_general}
        ops.merge_(weight, o.A, o.B, scaling=o.scaling, fan_in_fan_out=fan_in_fan_out, **general)


def can_keep(weight: Tensor, tensors: Iterable[Tensor | None]) -> bool:
    """Whether codes can be made for adapters of these tensors: all is in memory as plain tensors, and no transform is on."""
    plain = all(type(t.data) is Tensor and not t.is_meta for t in (weight, *tensors) if t is not None)
    return plain and weight.dtype in _DTYPES and weight.numel() > 0 and not _native.needs_plain_torch()


class Kept:
    """A merge of one or more adapters into one weight, and what takes it off: codes and exceptions, or a copy.

    It knows by checksums of before and after where the weight stands, and so can put back the weight of before wherever a merge
    or its removal was interrupted (:meth:`roll_back`, :meth:`put_on`). All methods write into the memory of the weight. Those two
    may be called again where they raised, and do nothing where there is nothing to undo.
    """

    def __init__(self, weight: Tensor, operands: Sequence[Operands], fan_in_fan_out: bool) -> None:
        self.operands, self.fan_in_fan_out = tuple(operands), fan_in_fan_out
        self.made_of = _description(weight)
        self.facts = torch.zeros(FACTS, dtype=torch.int64, device="cpu")
        self.codes: Tensor | None = None
        self.places = torch.empty(0, dtype=torch.int32, device="cpu")
        self.values = torch.empty(0, dtype=weight.dtype, device="cpu")
        self.copy: Tensor | None = None
        self.pending: Any = None  # chunked.py: what is being written
        self.removed = False  # whether a removal has begun that put_on would undo

    @torch.no_grad()
    def merge(self, weight: Tensor, to: Tensor) -> None:
        """Writes W' into ``to``, which is ``weight`` or another tensor of its shape and strides."""
        weight, to = weight.detach(), to.detach()
        wide = any(o.A.dtype == torch.float64 for o in self.operands) and weight.dtype != torch.float64
        if not wide and weight.numel() < 2**31:
            self._merge_coded(weight, to)
        if not self.facts[DONE]:
            self.codes, self.places, self.values = None, self.places[:0].clone(), self.values[:0].clone()
            self._merge_copied(weight, to)

    def _merge_coded(self, weight: Tensor, to: Tensor) -> None:
        if not _has_kernel(weight):
            return _chunked().merge(self, weight, to)
        room = capacity(weight)
        self.codes = _ops.empty_codes(weight)
        self.places = torch.empty(room, dtype=torch.int32, device="cpu")
        self.values = torch.empty(room, dtype=weight.dtype, device="cpu")
        _ops.merge_coded(weight, to, *self._arguments(), self.codes, self.places, self.values, self.facts)
        self.places, self.values = (t.clone() for t in self._listed())

    def _merge_copied(self, weight: Tensor, to: Tensor) -> None:
        self.facts[BEFORE], self.facts[FIRST_NOT_FINITE] = self._checksums(weight)[0], len(self.operands)
        self.copy = weight.clone()
        if to.data_ptr() != weight.data_ptr():
            to.copy_(weight)
        for i, operands in enumerate(self.operands):
            add(to, operands, self.fan_in_fan_out)
            if int(self.facts[FIRST_NOT_FINITE]) > i and not torch.isfinite(to).all():
                self.facts[FIRST_NOT_FINITE] = i
        self.facts[AFTER] = self._checksums(to)[1]
        self.facts[DONE] = 1

    def obstacle(self, weight: Tensor) -> str | None:
        """Why ``weight`` is not what the merge made, and cannot be taken back bit for bit; None where it can."""
        now = _description(weight)
        if now != self.made_of:
            was = f"was {_in_words(self.made_of)} when adapters were merged into it, so they were subtracted"
            return f"is {_in_words(now)} and {was}"
        if self._checksums(weight)[1] != int(self.facts[AFTER]):
            return "was changed after adapters were merged into it, so they were subtracted"
        return None

    @torch.no_grad()
    def take_off(self, weight: Tensor) -> str | None:
        """Makes ``weight``, in which :meth:`obstacle` sees none, that of before; returns why it is so but for rounding, if it is."""
        weight, self.removed = weight.detach(), True
        if self.copy is not None:
            weight.copy_(self.copy)
            return None
        if _has_kernel(weight):
            before = _ops.unmerge_coded_(weight, *self._arguments(), self.codes, *self._listed())
        else:
            before = _chunked().take_off(self, weight)
        # Sums are those of the merge on the same kind of processor alone.
        if before != int(self.facts[BEFORE]):
            return "was merged on another kind of processor, whose sums differ in their last bits"
        return None

    def put_on(self, weight: Tensor) -> None:
        """Undoes :meth:`take_off`, if it was called or begun: the same sums once more."""
        if not self.removed:
            return
        weight = weight.detach()
        if self.pending is not None or self._is_that_of_before(weight):
            if not _has_kernel(weight):
                _chunked().put_on(self, weight)
            else:
                for operands in self.operands:
                    add(weight, operands, self.fan_in_fan_out)
        self.removed = False

    def _is_that_of_before(self, weight: Tensor) -> bool:
        """Whether ``weight`` is that of before the merge. W' may have its sum, but has the checksum of after too."""
        before, after = (int(self.facts[fact]) for fact in (BEFORE, AFTER))
        if _description(weight) != self.made_of:
            return False
        found = self._checksums(weight)
        return found[0] == before and found[1] != after

    def roll_back(self, weight: Tensor) -> None:
        """Undoes :meth:`merge`, if it was called or begun."""
        if self.pending is not None:
            _chunked().remove(self, weight.detach())
        elif self.copy is not None or (self.facts[DONE] and self.obstacle(weight) is None):
            self.take_off(weight)

    def _arguments(self) -> tuple[Any, ...]:
        tensors = [t for o in self.operands for t in o[1:5]]
        scalings = [o.scaling for o in self.operands]
        return tensors, scalings, self.fan_in_fan_out

    def _listed(self) -> tuple[Tensor, Tensor]:
        """The list of exceptions, whose memory may be longer."""
        count = max(0, int(self.facts[LISTED]))
        return self.places[:count], self.values[:count]

    def _checksums(self, weight: Tensor) -> tuple[int, int]:
        """Of ``weight``, if it were that of before, and if it were that of after."""
        weight = weight.detach()
        return _ops.checksums(weight, self.fan_in_fan_out) if _has_kernel(weight) else _chunked().checksums(weight)


def capacity(weight: Tensor) -> int:
    """How many exceptions a list may have: a tenth of a byte for each weight, a place and a value for each exception."""
    return weight.numel() // (10 * (4 + weight.element_size()))


def merge(layer: GraloraLinear, names: Sequence[str], safe: bool) -> None:
    """Merges these adapters, one after the other, and keeps what takes all off that are then merged.

    Adapters that are merged already are taken off before and merged again with the new ones, which gives the bits of one merge
    after the other. Where the weight was changed since, there is no way back to before them any more; the new ones are merged
    over them, and nothing is kept for these.

    Raises:
        ValueError: the weight would not be finite after an adapter (``safe``); those before it in the list are merged.
    """
    weight: Tensor = layer.get_base_layer().weight
    old: Kept | None = layer.kept_merge if layer.merged_adapters else None
    stale = old is not None and old.obstacle(weight) is not None
    before = () if old is None or stale else old.operands
    operands = [*before, *(operands_of(layer, name) for name in names)]
    merged, records = list(layer.merged_adapters), list[Kept]()
    try:
        if old is not None and not stale:
            old.take_off(weight)
        broken = _merge(layer, weight, operands, safe, records)
        if broken is not None:
            operands = operands[: max(broken, len(before))]
            if operands:
                _merge(layer, weight, operands, False, records)
        done = [o.name for o in operands[len(before) :]]
        if not stale:
            layer.kept_merge = records[-1] if operands and (before or layer.exact_unmerge) else None
        layer.merged_adapters += done
    except BaseException:
        with Uninterrupted():
            put_back(weight, records, old if before else None)
            layer.kept_merge, layer.merged_adapters[:] = old, merged
        raise
    if broken is not None:
        raise ValueError(not_finite(names[len(done)]))


def _merge(
    layer: GraloraLinear, weight: Tensor, operands: Sequence[Operands], safe: bool, records: list[Kept]
) -> int | None:
    """Merges into the weight; with ``safe``, returns the first adapter that breaks it, and changes nothing then."""
    kept = Kept(weight, operands, layer.fan_in_fan_out)
    to = weight
    if safe:  # empty_like would close the gaps of a weight that is part of another tensor
        to = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    records.append(kept)
    if layer.journal is not None:
        layer.journal.append(kept)
    kept.merge(weight, to)
    broken = int(kept.facts[FIRST_NOT_FINITE])
    if safe and broken < len(operands):
        return broken
    if safe:
        weight.data = to
    return None


def unmerge(layer: GraloraLinear) -> str | None:
    """Takes all merged adapters off; returns why the weight is that of before but for rounding, if codes were to lead back."""
    weight: Tensor = layer.get_base_layer().weight
    kept, merged = layer.kept_merge, list(layer.merged_adapters)
    reason = None if kept is None else kept.obstacle(weight)
    coded = kept if reason is None else None
    as_merged = {} if kept is None else {o.name: o for o in kept.operands}
    subtracted = list[Operands]()
    for name in reversed(merged):
        if name in as_merged:
            if coded is None:
                layer.check_mergeable(None)
                subtracted.append(as_merged[name].taken_off(weight.device))
        elif name in layer.gralora_A:
            layer.check_mergeable(name)
            subtracted.append(operands_of(layer, name).taken_off(weight.device))
    records = list[Kept]()
    try:
        if coded is not None:
            reason = coded.take_off(weight)
        if subtracted:
            if layer.journal is not None and can_keep(weight, (t for o in subtracted for t in o[1:5])):
                _merge(layer, weight, subtracted, False, records)
            else:
                for operands in subtracted:
                    add(weight, operands, layer.fan_in_fan_out)
        layer.kept_merge = None
        layer.merged_adapters.clear()
    except BaseException:
        with Uninterrupted():
            put_back(weight, records, coded)
            layer.kept_merge, layer.merged_adapters[:] = kept, merged
        raise
    return reason


def put_back(weight: Tensor, records: Sequence[Kept], old: Kept | None) -> None:
    """Undoes the merges of ``records``, the last first, and puts on again what ``old`` had put on before them."""
    for record in reversed(records):
        record.roll_back(weight)
    if old is not None:
        old.put_on(weight)


def not_finite(adapter: str) -> str:
    """The message of a safe merge that is refused."""
    return (
        f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: the merged weights would hold "
        "NaN or infinity, and it was not merged"
    )


def refuse_device(what: str, device: torch.device, adapter: str, A: Tensor) -> NoReturn:
    """ValueError. Where one of two tensors is on meta, the dispatcher would pick the fake kernel, which computes nothing."""
    raise ValueError(
        f"{what} is on {device}, but adapter {adapter!r} is on {A.device}: move the model to one device, "
        "or load the weights of what is on meta"
    )


def _description(weight: Tensor) -> tuple[Any, ...]:
    return weight.dtype, weight.device, tuple(weight.shape), weight.stride()


def _in_words(description: tuple[Any, ...]) -> str:
    dtype, device, shape, strides = description
    return f"{dtype} on {device} of shape {list(shape)} and strides {list(strides)}"


def _has_kernel(weight: Tensor) -> bool:
    """Whether the codes are made by csrc/cpu/coded_merge.cpp; else ``chunked.py`` makes them."""
    return weight.is_cpu


def _chunked() -> Any:
    from . import chunked

    return chunked
