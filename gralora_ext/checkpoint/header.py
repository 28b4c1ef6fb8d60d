# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, read from text that may be anything, and written.

A file is 8 bytes with the header's length, the header in JSON, and the tensors' bytes without holes between them. The JSON is read
entry by entry, so that memory stays within ten times the header's length whatever is in it: a parser of all JSON makes 20 times as
much of deeply nested brackets. Nothing of the tensors is looked at.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from .json_text import Malformed, each_member, read_texts, skip

# The format's own limit is 100 MB. 32 MiB hold 220,000 tensors with names of the usual length; an
# adapter of all experts of a large model has 40,000.
MOST_HEADER_BYTES = 32 << 20
MOST_NAME = 512
MOST_DIMENSIONS = 64  # as many as a torch tensor can have
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
_ENTRY = re.compile(r"\{[^{}]{0,4096}\}")
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_LARGEST = 2**63 - 1


class TensorInfo(NamedTuple):
    """One tensor of a file: ``begin`` and ``end`` count bytes from the file's beginning."""

    name: str
    dtype: str  # as the format calls it: BF16, F16, F32, ...
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def nbytes_of(dtype: str, shape: Iterable[int]) -> int:
    """The bytes of a tensor; Malformed where the dtype is none of the format's, or where it ends within a byte."""
    bits = _BITS.get(dtype)
    if bits is None:
        raise Malformed(f"has dtype {dtype[:20]!r}, which is none of safetensors'")
    whole, rest = divmod(math.prod(shape) * bits, 8)
    if rest:
        raise Malformed(f"of dtype {dtype} ends within a byte")
    return whole


def parse(text: bytes, data_begin: int, file_size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors in the order of their bytes, and the metadata.

    Raises:
        Malformed: the text is not a header, or does not describe exactly the bytes from ``data_begin`` to ``file_size``.
    """
    try:
        header = text.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("has a header that is not UTF-8") from None
    tensors: dict[str, TensorInfo] = {}
    metadata: list[dict[str, str]] = []

    def take(name: str, at: int) -> int:
        if name == "__metadata__":
            if metadata:
                raise Malformed("has two entries __metadata__")
            values, at = read_texts(header, at)
            metadata.append(values)
        elif len(name) > MOST_NAME:
            raise Malformed(f"has a tensor with a name of {len(name):,} characters")
        elif not name.isprintable():
            raise Malformed(f"has a tensor with control characters in its name, {name[:80]!r}")
        elif name in tensors:
            raise Malformed(f"has two tensors {name[:80]!r}")
        else:
            tensors[name], at = _entry(header, at, name, data_begin)
        return at

    at = each_member(header, 0, take)
    if header[at:].strip(" \t\n\r\0"):
        raise Malformed("has something behind the end of its header's JSON")
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end))
    _check_without_holes(ordered, data_begin, file_size)
    return {tensor.name: tensor for tensor in ordered}, metadata[0] if metadata else {}


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a file with ``tensors`` (name, dtype, shape), and where each lies in it.

    They keep their order but for the sizes of their elements, the largest first: so each begins at a multiple of its own, which
    readers rely on.
    """
    parts = [f'"__metadata__":{json.dumps(metadata, ensure_ascii=False)}'] if metadata else []
    placed, offset = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -_BITS[tensor[1]]):
        end = offset + nbytes_of(dtype, shape)
        sizes = ",".join(map(str, shape))
        quoted = json.dumps(name, ensure_ascii=False)
        parts.append(f'{quoted}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{offset},{end}]}}')
        placed[name] = TensorInfo(name, dtype, shape, offset, end)
        offset = end
    text = f"{{{','.join(parts)}}}".encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    for name, info in placed.items():
        placed[name] = info._replace(begin=begin + info.begin, end=begin + info.end)
    return len(text).to_bytes(8, "little") + text, placed


def _check_without_holes(ordered: list[TensorInfo], data_begin: int, file_size: int) -> None:
    end = data_begin
    for tensor in ordered:
        if tensor.begin != end:
            what = "overlaps the tensor before it" if tensor.begin < end else "leaves a hole before it"
            raise Malformed(f"has a tensor {tensor.name[:80]!r} that {what}")
        end = tensor.end
    if end != file_size:
        raise Malformed(f"has {file_size:,} bytes where its header tells of {end:,}")


def _entry(header: str, at: int, name: str, data_begin: int) -> tuple[TensorInfo, int]:
    found = _ENTRY.match(header, skip(header, at))
    label = f"has a tensor {name[:80]!r} that"
    if not found:
        raise Malformed(f"{label} has no entry of dtype, shape and data_offsets")
    try:
        pairs = json.loads(found[0], object_pairs_hook=list, parse_float=_refuse, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Malformed(f"{label} has an entry that is not JSON") from None
    if len(pairs) != len(_FIELDS) or {key for key, _ in pairs} != _FIELDS:
        raise Malformed(f"{label} has an entry other than dtype, shape and data_offsets")
    values = dict(pairs)
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str):
        raise Malformed(f"{label} has a dtype that is not a text")
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise Malformed(f"{label} has a shape that is not a list of at most {MOST_DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise Malformed(f"{label} has data_offsets that are not two positions")
    begin, end = offsets
    try:
        size = nbytes_of(dtype, shape)
    except Malformed as error:
        raise Malformed(f"has a tensor {name[:80]!r} that {error}") from None
    if end - begin != size:
        raise Malformed(f"{label} takes {size:,} bytes by its dtype and shape, and {end - begin:,} by its data_offsets")
    return TensorInfo(name, _INTERNED[dtype], tuple(shape), data_begin + begin, data_begin + end), found.end()


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _LARGEST for value in values)


def _refuse(text: str) -> None:
    raise ValueError(text)


_INTERNED = {name: name for name in _BITS}
