# SPDX-License-Identifier: Apache-2.0
"""Tensors written and copied without more memory than a piece of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .safetensors_file import SafetensorsFile, SafetensorsWriter

_PIECE = 8 << 20


def write_tensor(file: SafetensorsWriter, name: str, tensor: Tensor) -> None:
    """Writes all of a tensor, which has the shape and the dtype that the file was laid out for."""
    file.write(file.tensors[name].begin, tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def copy_tensor(source: SafetensorsFile, name: str, file: SafetensorsWriter) -> None:
    """Copies the bytes of a tensor to that of the same name."""
    info, begin = source.tensors[name], file.tensors[name].begin
    buffer = bytearray(min(_PIECE, info.nbytes))
    for done in range(0, info.nbytes, _PIECE):
        piece = memoryview(buffer)[: info.nbytes - done]
        source.read_into(info.begin + done, piece)
        file.write(begin + done, piece)
