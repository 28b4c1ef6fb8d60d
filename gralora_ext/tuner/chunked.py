# SPDX-License-Identifier: Apache-2.0
"""The codes of ``exact.py`` in plain torch, for devices other than the CPU, whose own are in ``csrc/cpu/coded_merge.cpp``.

It goes over rows of the weight, so that nothing of the weight's size is made but the codes. While one of the two works, ``merge``
or ``take_off``, is on its way, ``pending`` has its name, the rows that are being written, and what stood in them: the rows above are
done, those from there on are not. So an interruption, or an error, leaves nothing unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .exact import AFTER, BEFORE, DONE, FIRST_NOT_FINITE, LISTED, Operands, add, capacity

if TYPE_CHECKING:
    from .exact import Kept

ELEMENTS = 1 << 22  # of the rows of a step
_ZERO, _LISTED, _MOST = 127, -128, 126
_KEY = 0x9E3779B97F4A7C15 - 2**64
_LOW = 0xFFFFFFFF
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def merge(kept: Kept, weight: Tensor, to: Tensor) -> None:
    """Writes W' into ``to`` and the codes into ``kept``; where the list would be too long, undoes that and is not done."""
    kept.codes = torch.empty(weight.numel(), dtype=torch.int8, device=weight.device)
    kept.places, kept.values = kept.places.to(weight.device), kept.values.to(weight.device)
    codes, before, after = kept.codes.view(weight.shape), 0, 0
    finite, in_place = len(kept.operands), to.data_ptr() == weight.data_ptr()
    for rows in _steps(weight):
        old = weight[rows].clone()
        new, broken = _merged(kept, old, rows)
        finite = min(finite, broken)
        codes[rows] = _encoded(old, _way_back(kept, new, rows))
        listed = (codes[rows].flatten() == _LISTED).nonzero().flatten()
        if len(kept.places) + len(listed) > capacity(weight):
            return remove(kept, to)
        places = (listed + rows.start * weight.shape[1]).to(torch.int32)
        kept.values = torch.cat([kept.values, old.reshape(-1)[listed]])
        kept.places = torch.cat([kept.places, places])
        before, after = before + _sum(old), after + _mixed_sum(new, rows)
        if in_place:
            kept.pending = (merge, rows, old)
        to[rows] = new
    kept.facts[BEFORE], kept.facts[AFTER] = _wrapped(before), _wrapped(after)
    kept.facts[LISTED], kept.facts[FIRST_NOT_FINITE] = len(kept.places), finite
    kept.facts[DONE] = 1
    kept.pending = None


def take_off(kept: Kept, weight: Tensor) -> int:
    """Makes ``weight`` that of before the merge, and returns its checksum as that of before."""
    before = 0
    for rows in _steps(weight):
        merged = weight[rows].clone()
        old = _decoded(kept, merged, rows)
        before += _sum(old)
        kept.pending = (take_off, rows, merged)
        weight[rows] = old
    kept.pending = None
    return _wrapped(before)


def remove(kept: Kept, weight: Tensor) -> None:
    """Makes ``weight`` that of before the merge, wherever a merge or a taking off was left."""
    if kept.pending is not None:
        _bring(kept, weight, False)


def put_on(kept: Kept, weight: Tensor) -> None:
    """Makes ``weight`` that of after the merge, wherever a taking off was left, its end too."""
    if kept.pending is None:
        end = weight.shape[0]
        kept.pending = (take_off, slice(end, end), weight[end:].clone())
    _bring(kept, weight, True)


def _bring(kept: Kept, weight: Tensor, merged: bool) -> None:
    """Goes on with the work that is pending, or goes back; either may be broken off and called again."""
    work, pending, before = kept.pending
    weight[pending] = before
    forward = (work is merge) == merged
    steps = [rows for rows in _steps(weight) if (rows.start >= pending.start) == forward]
    for rows in steps if forward else reversed(steps):
        old = weight[rows].clone()
        new = _merged(kept, old, rows)[0] if merged else _decoded(kept, old, rows)
        kept.pending = (work, rows, old if forward else new)
        weight[rows] = new
    kept.pending = None


def checksums(weight: Tensor) -> tuple[int, int]:
    """Those of ``codes.h``, over the weight's rows as they are stored."""
    before = sum(_sum(weight[rows]) for rows in _steps(weight))
    after = sum(_mixed_sum(weight[rows], rows) for rows in _steps(weight))
    return _wrapped(before), _wrapped(after)


def _steps(weight: Tensor) -> Iterator[slice]:
    height = max(1, ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], height):
        yield slice(start, min(start + height, weight.shape[0]))


# ---------------------------------------------------------------- sums


def _merged(kept: Kept, old: Tensor, rows: slice) -> tuple[Tensor, int]:
    """W' of these rows, and the first adapter after which they are not finite."""
    new, broken = old.clone(), len(kept.operands)
    for i, operands in enumerate(kept.operands):
        _add_to_rows(new, operands, kept.fan_in_fan_out, rows)
        if broken > i and not torch.isfinite(new).all():
            broken = i
    return new, broken


def _way_back(kept: Kept, merged: Tensor, rows: slice) -> Tensor:
    """V of these rows."""
    wide = torch.float64 if merged.dtype == torch.float64 else torch.float32
    total = torch.zeros_like(merged, dtype=wide)
    for operands in kept.operands:
        _add_to_rows(total, operands, kept.fan_in_fan_out, rows)
    return (merged.to(wide) - total).to(merged.dtype)


def _add_to_rows(target: Tensor, o: Operands, fan_in_fan_out: bool, rows: slice) -> None:
    """Adds these rows of dW, as stored, to ``target``: each part of a block as an adapter with a grid of one block."""
    k, rb = o.A.shape[0], o.A.shape[2] // o.A.shape[0]
    height, width = (o.A.shape[1], o.B.shape[2]) if fan_in_fan_out else (o.B.shape[2], o.A.shape[1])
    start = rows.start
    while start < rows.stop:
        a = start // height
        stop = min(rows.stop, (a + 1) * height)
        within, part = slice(start - a * height, stop - a * height), slice(start, stop)
        for b in range(k):
            across = slice(b * width, (b + 1) * width)
            n, j, i, m = (a, b, within, slice(None)) if fan_in_fan_out else (b, a, slice(None), within)
            N, M = (part, across) if fan_in_fan_out else (across, part)
            piece = Operands(
                o.name,
                o.A[n : n + 1, i, j * rb : (j + 1) * rb],
                o.B[j : j + 1, n * rb : (n + 1) * rb, m],
                None if o.A_general is None else o.A_general[:, N],
                None if o.B_general is None else o.B_general[M],
                o.scaling,
            )
            add(target[start - rows.start : stop - rows.start, across], piece, fan_in_fan_out)
        start = stop


# ---------------------------------------------------------------- codes


def _position(bits: Tensor) -> Tensor:
    """The index of numbers among all of their dtype, from their bits, and back."""
    width = 8 * bits.element_size()
    return bits ^ ((bits >> (width - 1)) & (2 ** (width - 1) - 1))


def _bits(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(_INTEGERS[numbers.element_size()])


def _encoded(weights: Tensor, back: Tensor) -> Tensor:
    bits = _bits(weights)
    units = _position(bits) - _position(_bits(back))
    fits = (units >= -_MOST) & (units <= _MOST) & ~back.isnan()
    return torch.where(bits == 0, _ZERO, torch.where(fits, units, _LISTED)).to(torch.int8)


def _decoded(kept: Kept, merged: Tensor, rows: slice) -> Tensor:
    assert kept.codes is not None
    columns = merged.shape[1]
    bits = _bits(_way_back(kept, merged, rows))
    codes = kept.codes.view(-1, columns)[rows]
    weights = _position(_position(bits) + codes.to(bits.dtype)).masked_fill(codes == _ZERO, 0)
    first, last = rows.start * columns, rows.stop * columns
    here = ((kept.places >= first) & (kept.places < last)).nonzero().flatten()
    weights.view(-1)[(kept.places[here] - first).long()] = _bits(kept.values[here])
    return weights.view(merged.dtype)


def _words(numbers: Tensor) -> Tensor:
    per_word = 8 // numbers.element_size()
    padded = torch.nn.functional.pad(_bits(numbers), (0, -numbers.shape[1] % per_word))
    return padded.contiguous().view(torch.int64)


def _sum(numbers: Tensor) -> int:
    """What rows add to the checksum of before, not yet within 64 bits."""
    return int(_words(numbers).sum())


def _mixed_sum(numbers: Tensor, rows: slice) -> int:
    """What these rows add to the checksum of after, not yet within 64 bits."""
    words = _words(numbers)
    first = rows.start * words.shape[1] + 1
    keys = torch.arange(first, first + words.numel(), device=words.device).view(words.shape) * _KEY
    mixed = words ^ keys
    return int(((mixed & _LOW) * (mixed >> 32 & _LOW)).sum())


def _wrapped(total: int) -> int:
    """As a signed number of 64 bits."""
    return (total + 2**63) % 2**64 - 2**63
