# SPDX-License-Identifier: Apache-2.0
"""Parameters that share a tensor, such as the embedding and the head of a model, where an adapter changes one of them."""

from __future__ import annotations

from ..program.errors import FileError
from .adapter import Adapter
from .base import CONFIG, BaseModel
from .jobs import Job
from .names import Names, parameters_of


def untie(base: BaseModel, adapters: list[Adapter], names: Names, jobs: dict[str, Job], owners: dict[str, str]) -> bool:
    """Gives a parameter that shares a tensor with another one its own, where an adapter changes only one of them.

    In memory PEFT would then change both, or one, by how they are tied; here each becomes what the adapter makes of it. Returns
    whether any was given its own, of which the result's configuration must tell.

    Raises:
        FileError: the model has several such pairs, for which a configuration has one word.
    """
    changed = {parameter for adapter in adapters for parameter in parameters_of(adapter)}
    untied: list[tuple[str, str]] = []
    for target, source in names.tied.items():
        if not changed & {target, source} or _is_same_whole(adapters, target, source):
            continue
        stored = [name for name in (target, source) if name in names.tensors]
        if stored:
            untied.append((target, source))
        if len(stored) == 1:
            missing = target if stored == [source] else source
            tensor = names.tensors[stored[0]]
            job = jobs[tensor]
            jobs[missing] = Job(missing, job.dtype, job.shape, job.source, job.computed)
            owners[missing] = tensor
            names.tensors[missing] = missing
    if untied and len(names.tied) > 1:
        first, second = untied[0]
        raise FileError(
            f"{base.folder / CONFIG} ties {len(names.tied)} pairs of parameters, and cannot say that {first} and {second} differ, of "
            "which an adapter changes one alone: load the model with PEFT and merge it there"
        )
    return bool(untied)


def _is_same_whole(adapters: list[Adapter], target: str, source: str) -> bool:
    """Whether the adapters train both, as one: then the result shares them as the base does."""
    found = False
    for adapter in adapters:
        if any(
            parameter in adapter.layers
            for parameter in (target.removesuffix(".weight"), source.removesuffix(".weight"))
        ):
            return False
        pair = [adapter.whole.get(parameter) for parameter in (target, source)]
        if pair == [None, None]:
            continue
        first, second = pair
        if first is None or second is None or not adapter.file.is_same(first, second):
            return False
        found = True
    return found
