# SPDX-License-Identifier: Apache-2.0
"""A device without kernels of ours, ``card``: its tensors hold one on the CPU, which torch's operations are computed with.

Importing this module registers it in place of torch's PrivateUse1, for the rest of the process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class CardTensor(torch.Tensor):
    held: torch.Tensor  # on the CPU

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        strides, dtype = held.stride(), held.dtype
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=strides, dtype=dtype, device="card:0")
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(op, *args, **(kwargs or {}))


def on_cpu(value: Any) -> Any:
    if isinstance(value, CardTensor):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "card" else value


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    if op.namespace == "gralora_ext":
        raise NotImplementedError(f"{op} has no kernel for the card")
    given = {id(on_cpu(a)): a for a in args if isinstance(a, CardTensor)}

    def on_card(value: Any) -> Any:
        return given.get(id(value), CardTensor(value)) if isinstance(value, torch.Tensor) else value

    return tree_map(on_card, op(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs)))


_setup_privateuseone_for_python_backend("card")
_library = torch.library.Library("_", "IMPL")  # for what has no tensor among its arguments; as long as the module lives
_library.fallback(compute, "PrivateUse1")
