# SPDX-License-Identifier: Apache-2.0
"""What a merge will write: which tensor goes into which file, where its bytes come from, and which adapters are added to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..program.errors import FileError
from .adapter import Adapter, Layer
from .base import SINGLE, BaseModel, Source
from .jobs import Addition, Job, Shard
from .names import Names, names_of
from .safetensors_file import NAMES_OF_DTYPES, TORCH_DTYPES
from .ties import untie

FLOATS = ("BF16", "F16", "F32", "F64")
_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


@dataclass
class Plan:
    shards: list[Shard]
    sharded: bool
    index_metadata: dict[str, Any]
    config_changes: dict[str, Any]  # of config.json
    dtype: torch.dtype | None

    @property
    def jobs(self) -> list[Job]:
        return [job for shard in self.shards for job in shard.jobs]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """One of bf16, fp16 and fp32, by torch's name or these; None stays None."""
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if dtype is not None and found is None:
        raise FileError(f"dtype: expected bf16, fp16 or fp32, got {dtype!r}")
    return found


def parse_size(size: int | str | None) -> int | None:
    """A number of bytes, or a text such as 5GB, as transformers takes it."""
    if size is None:
        return None
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        count = int(size) if isinstance(size, int) or str(size).strip().isdigit() else parse_size_to_int(size)
    except (ValueError, OverflowError):
        count = 0
    if count <= 0 or isinstance(size, bool):
        raise FileError(f"max_shard_size: expected a positive number of bytes, or a text such as 5GB, got {size!r}")
    return count


def make_plan(
    base: BaseModel, adapters: list[Adapter], dtype: torch.dtype | None, max_shard_size: int | None, scale: float
) -> Plan:
    """Finds each adapter's tensors in the base.

    Raises:
        FileError: a name, a shape or a dtype of an adapter does not fit the base; both are named. Or ``scale`` is not 1, and an
            adapter holds tensors whole.
    """
    _check_scale(adapters, scale)
    names = names_of(base, adapters)
    jobs = {
        name: Job(name, source.info.dtype, source.info.shape, source, source.info.dtype)
        for name, source in base.tensors.items()
    }
    owners: dict[str, str] = {}  # the tensor of the base beside which a new one is written
    _add_heads(adapters, names, jobs, owners)
    untied = untie(base, adapters, names, jobs, owners)
    for adapter in adapters:
        _add(base, adapter, names, jobs, scale)
    for job in jobs.values():
        if dtype is not None and job.dtype in FLOATS:
            # One rounding, to the dtype asked for. In memory a model is cast before or after, and
            # rounded twice.
            job.computed = NAMES_OF_DTYPES[torch.promote_types(TORCH_DTYPES[job.dtype], dtype)]
            job.dtype = NAMES_OF_DTYPES[dtype]
    changes: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")} if dtype is not None else {}
    changes |= _config_of_heads(names, jobs)
    if untied:
        changes["tie_word_embeddings"] = False
    new = sum(math.prod(job.shape) for name, job in jobs.items() if name not in base.tensors)
    metadata = dict(base.index_metadata)
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += new
    shards = _shards(base, jobs, owners, max_shard_size)
    metadata["total_size"] = sum(shard.nbytes for shard in shards)
    return Plan(shards, [shard.name for shard in shards] != [SINGLE], metadata, changes, dtype)


def _check_scale(adapters: list[Adapter], scale: float) -> None:
    """What an adapter holds whole takes the place of the base's tensor, and cannot be scaled without it."""
    for adapter in adapters:
        if adapter.whole and scale != 1:
            raise FileError(
                f"scale: expected 1 for {adapter.folder}, since it holds {next(iter(adapter.whole))} whole, which takes the place "
                f"of the base's, got {scale}"
            )


def _add_heads(adapters: list[Adapter], names: Names, jobs: dict[str, Job], owners: dict[str, str]) -> None:
    """Makes room for what is trained whole and new, as the head of another task, in the dtype of the base's weights."""
    last, dtype = next(reversed(jobs)), next((job.dtype for job in jobs.values() if job.dtype in FLOATS), "F32")
    for adapter in adapters:
        for parameter, info in adapter.whole.items():
            if parameter in names.new:
                source = Source(adapter.file.path, adapter.file.stamp, info)
                jobs[parameter] = Job(parameter, dtype, info.shape, source, dtype)
                owners[parameter] = last
                names.tensors[parameter] = parameter


def _config_of_heads(names: Names, jobs: dict[str, Job]) -> dict[str, Any]:
    """What a model with a new head says of itself: its class, and how many labels it has."""
    if not names.new:
        return {}
    changes: dict[str, Any] = {"architectures": [names.model_class]}
    for name, shape in names.new.items():
        ours = jobs[name].shape
        if shape != list(ours) and shape[:1] == [names.num_labels]:
            changes["id2label"] = {str(n): f"LABEL_{n}" for n in range(ours[0])}
            changes["label2id"] = {label: int(n) for n, label in changes["id2label"].items()}
    return changes


def _add(base: BaseModel, adapter: Adapter, names: Names, jobs: dict[str, Job], scale: float) -> None:
    for parameter, info in adapter.whole.items():
        tensor = names.tensors.get(parameter)
        if tensor is None and parameter in names.tied:  # both are trained as one, and the base has the other
            continue
        job = jobs[names.of(parameter, adapter, base)]
        if job.shape != info.shape or (job.dtype != info.dtype and not {job.dtype, info.dtype} <= set(FLOATS)):
            raise FileError(
                f"{adapter.file.path}: {info.name} is {info.dtype} {list(info.shape)}, but {job.name} of {base.folder} is "
                f"{job.dtype} {list(job.shape)}: expected the adapter's own base model"
            )
        job.source = Source(adapter.file.path, adapter.file.stamp, info)
        job.additions = ()
    found = {layer.name: jobs[names.of(f"{layer.name}.weight", adapter, base)] for layer in adapter.layers.values()}
    transposed = {name: _is_transposed(adapter.layers[name], job, adapter, base) for name, job in found.items()}
    for name, job in found.items():
        layer, stored = adapter.layers[name], transposed[name]
        if stored is None:
            stored = names.transposed.get(name)
        if stored is None:
            stored = _by_others(name, transposed, adapter)
        job.additions += (Addition(layer, layer.scaling * scale, stored),)


def _is_transposed(layer: Layer, job: Job, adapter: Adapter, base: BaseModel) -> bool | None:
    """Whether a weight is stored as [N, M], as Conv1D does; None where it is square."""
    M, N = layer.out_features, layer.in_features
    if job.shape not in ((M, N), (N, M)) or job.dtype not in FLOATS:
        raise FileError(
            f"{adapter.file.path}: layer {layer.name} is for a weight [{M}, {N}] in bf16, fp16 or fp32, but {job.name} of "
            f"{base.folder} is {job.dtype} {list(job.shape)}"
        )
    return None if M == N else job.shape == (N, M)


def _by_others(name: str, transposed: dict[str, bool | None], adapter: Adapter) -> bool:
    """How a square weight is stored in a model that transformers does not know: as the others of its layer's name.

    Without such others all must say the same. That some are transposed tells nothing of this one, since a model may be made of two.
    """
    last = name.rpartition(".")[2]
    others = {other: is_so for other, is_so in transposed.items() if is_so is not None}
    alike = {is_so for other, is_so in others.items() if other.rpartition(".")[2] == last}
    if len(alike) == 1:
        return alike.pop()
    said = adapter.fan_in_fan_out
    if others and (said or any(others.values())):
        raise FileError(
            f"{adapter.file.path}: the weight of layer {name} is square, and whether it is stored transposed, as others of this "
            "model are, cannot be told from the files: load the model with PEFT and merge it there"
        )
    return said


def _shards(base: BaseModel, jobs: dict[str, Job], owners: dict[str, str], max_shard_size: int | None) -> list[Shard]:
    if max_shard_size is None:
        by_file: dict[str, list[Job]] = {name: [] for name in base.files}
        for name, job in jobs.items():
            by_file[base.tensors[owners.get(name, name)].path.name].append(job)
        return [Shard(name, its, base.file_metadata[name]) for name, its in by_file.items()]
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        jobs, get_storage_size=_nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    metadata = next(iter(base.file_metadata.values()))
    return [Shard(file, [jobs[name] for name in names], metadata) for file, names in split.filename_to_tensors.items()]


def _nbytes(job: Job) -> int:
    return job.nbytes
