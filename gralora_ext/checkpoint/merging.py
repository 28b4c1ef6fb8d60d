# SPDX-License-Identifier: Apache-2.0
"""Merging adapters into a model in files, with no more memory than a few buffers and one layer's adapter."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gralora_ext

from ..program.errors import FileError, JobError
from ..program.files import flush, free_bytes, write_json
from .adapter import Adapter
from .adapter_config import is_number
from .base import CONFIG, INDEX, BaseModel
from .jobs import Shard
from .pipeline import Pipeline, RunningHash
from .plan import Plan, make_plan, parse_dtype, parse_size
from .safetensors_file import SafetensorsFile, refuse_changed
from .sealed import blocks_of, entry_of, sha256_of
from .staging import MANIFEST, Staging, check, opened

PathLike = str | os.PathLike[str]


@dataclass
class MergeReport:
    """What :func:`merge` did, or would do."""

    out: Path
    files: list[str] = field(default_factory=list)  # of weights
    tensors: int = 0
    merged: int = 0  # weights that an adapter was added to
    replaced: int = 0  # tensors that were trained whole
    total_bytes: int = 0  # of all weights
    written_bytes: int = 0  # of weights, by this call
    kept_files: int = 0  # of weights, that an earlier try had finished
    seconds: float = 0.0
    was_done: bool = False  # all was there already
    moved_aside: list[Path] = field(default_factory=list)  # files that no merge wrote, or that were changed since

    @property
    def gb_per_second(self) -> float:
        return self.written_bytes / 1e9 / max(self.seconds, 1e-9)


def merge(
    base: PathLike,
    adapter: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    scale: float = 1.0,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Writes the model in the folder ``base``, with adapters merged into its weights, to the folder ``out``.

    ``W[j·M/k+o, n·N/k+i] += scale · s Σ_q A[n,i,j·rb+q] B[j,n·rb+q,o] (+ scale · s Bg Ag)``, each weight rounded once: the bits of
    ``merge_and_unload`` with our layers. Weights are read and written in pieces; beyond what the process has after its imports it
    takes at most 64 MiB and what the adapters have for one layer, whatever the model.

    The result has the base's files of weights, its tokenizer, generation config and other small files, and ``merge.json``, which
    lists inputs and outputs with their SHA-256. A merge that was killed goes on where it was; one that is done ends at once.

    Args:
        base: a model as ``save_pretrained`` writes it, safetensors in bfloat16, float16 or float32, in one file or sharded.
        adapter: a GraLoRA or LoRA adapter as PEFT writes it; or several, which are merged one after the other.
        out: a new or empty folder, or that of an earlier merge.
        dtype: bf16, fp16 or fp32 for all floating-point weights; None leaves each as it is. Sums are rounded to it once.
        max_shard_size: the most bytes of a file of weights, or a text such as ``"5GB"``; None leaves the files as they are.
        scale: multiplies what is added; -1 takes an adapter off again. It must be 1 for one that holds tensors whole.
        overwrite: replaces the files of an earlier merge in ``out``. One that was changed since is moved aside, to a name with
            ``.kept`` at its end; other files are never touched.
        dry_run: only checks, and reports what would be done.
        progress: called with the bytes of weights that are written, and all of them.

    Raises:
        ValueError: a value, a file or a name is not what it must be; the message names it, what was expected and what came.
        JobError: ``out`` cannot be written; what was finished stays, and the same call goes on from there.
    """
    start = time.perf_counter()
    paths = [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter)
    if not paths:
        raise FileError("adapter: expected at least one folder, got none")
    if not is_number(scale):
        raise FileError(f"scale: expected a finite number, got {scale!r:.60}")
    kind, most = parse_dtype(dtype), parse_size(max_shard_size)
    place = Path(out).expanduser()
    with ExitStack() as stack:
        base_model = BaseModel(Path(base).expanduser())
        adapters = [stack.enter_context(Adapter(Path(path).expanduser())) for path in paths]
        _check_place(place, base_model, adapters)
        plan = make_plan(base_model, adapters, kind, most, scale)
        for each in adapters:
            each.check_finite()
        report = _report(place, plan, adapters)
        request = {
            "base": str(base_model.folder.resolve()),
            "adapters": [str(each.folder.resolve()) for each in adapters],
            "scale": float(scale),
            "dtype": None if kind is None else str(kind).removeprefix("torch."),
            "max_shard_size": most,
        }
        small = [name for name in base_model.small_files() if name != MANIFEST]
        names = [*(shard.name for shard in plan.shards), *([INDEX] if plan.sharded else []), *small]
        inputs = {str(path.absolute()): entry_of(path) for path in _inputs(base_model, adapters, small)}
        if dry_run:
            report.was_done = check(place, request, inputs, [*names, CONFIG], overwrite).is_done
            return report
        with opened(place, request, inputs, [*names, CONFIG], overwrite) as staging:
            report.was_done = staging.is_done
            if not staging.is_done:
                _write(staging, base_model, adapters, plan, small, report, progress)
        report.seconds = time.perf_counter() - start
        return report


def _write(
    staging: Staging,
    base: BaseModel,
    adapters: list[Adapter],
    plan: Plan,
    small: list[str],
    report: MergeReport,
    progress: Callable[[int, int], None] | None,
) -> None:
    missing = [shard for shard in plan.shards if shard.name not in staging.outputs]
    report.kept_files = len(plan.shards) - len(missing)
    report.written_bytes = sum(shard.nbytes for shard in missing)
    _check_space(staging.out, report.written_bytes + sum((base.folder / name).stat().st_size for name in small))
    done = plan.nbytes - report.written_bytes

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, plan.nbytes)

    with ThreadPoolExecutor(1) as beside:
        hashes = _InputHashes(staging, [base.folder / name for name in base.files], beside)
        with Pipeline(hashes.running, tell) as pipeline:
            for shard in missing:
                sha256 = _write_shard(staging.folder, pipeline, shard)
                hashes.keep()
                staging.finished(shard.name, sha256)
        for name in small:
            _finish(staging, name, partial(_copy, base.folder / name))
        if plan.sharded:
            files = {job.name: shard.name for shard in plan.shards for job in shard.jobs}
            index = {"metadata": plan.index_metadata, "weight_map": dict(sorted(files.items()))}
            _finish(staging, INDEX, partial(write_json, value=index))
        _finish(staging, CONFIG, partial(_write_config, base=base, plan=plan))
        hashes.complete()
    for name, entry in staging.inputs.items():
        if entry_of(Path(name))["stamp"] != entry["stamp"]:
            refuse_changed(Path(name))
    for adapter in adapters:
        adapter.file.check_unchanged()
    staging.place({"gralora_ext": gralora_ext.__version__, "torch": torch.__version__})
    report.moved_aside = staging.moved_aside


class _InputHashes:
    """Finds the SHA-256 of the inputs that have none yet: of the base's weights while they are read, of the others ``beside``."""

    def __init__(self, staging: Staging, weights: list[Path], beside: ThreadPoolExecutor):
        self.inputs = staging.inputs
        unknown = [path for path, entry in self.inputs.items() if entry["sha256"] is None]
        by_path = {str(path.absolute()): path for path in weights}
        self.running = {by_path[path]: RunningHash() for path in unknown if path in by_path}
        self._others = {path: beside.submit(sha256_of, Path(path)) for path in unknown if path not in by_path}

    def keep(self) -> None:
        """Puts what is known by now beside the inputs."""
        for path, running in self.running.items():
            entry = self.inputs[str(path.absolute())]
            if running.at == entry["bytes"]:
                entry["sha256"] = running.value.hexdigest()
        for name, found in self._others.items():
            if found.done():
                self.inputs[name]["sha256"] = found.result()

    def complete(self) -> None:
        """Reads what has not been read, or not in order."""
        for path, running in self.running.items():
            with SafetensorsFile(path) as file:
                running.catch_up(file.fd, file.size)
        wait(self._others.values())
        self.keep()


def _write_shard(folder: Path, pipeline: Pipeline, shard: Shard) -> str:
    beside = folder / f"{shard.name}.part"
    try:
        sha256 = pipeline.write(shard, beside)
    except BaseException:
        beside.unlink(missing_ok=True)  # where the disk is full, this makes room
        raise
    os.replace(beside, folder / shard.name)
    flush(folder)
    return sha256


def _finish(staging: Staging, name: str, write: Callable[[Path], None]) -> None:
    if name in staging.outputs:
        return
    path = staging.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    flush(path)
    staging.finished(name, sha256_of(path))


def _copy(path: Path, to: Path) -> None:
    with open(to, "wb") as target:
        target.writelines(blocks_of(path))


def _write_config(path: Path, base: BaseModel, plan: Plan) -> None:
    if not plan.config_changes:
        return _copy(base.folder / CONFIG, path)
    config = copy.deepcopy(base.config)
    config |= {key: value for key, value in plan.config_changes.items() if key != "dtype"}
    for part in _parts(config):
        for name, key in (("dtype", "dtype"), ("torch_dtype", "dtype"), ("tie_word_embeddings",) * 2):
            if name in part and key in plan.config_changes:
                part[name] = plan.config_changes[key]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")  # some have Infinity, which is no JSON


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and all within it: models of several parts have one for each."""
    parts = [config]
    while parts:
        part = parts.pop()
        yield part
        parts += [value for value in part.values() if isinstance(value, dict)]


def _check_place(out: Path, base: BaseModel, adapters: list[Adapter]) -> None:
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is not a folder: expected a new or empty one")
    for folder in (base.folder, *(adapter.folder for adapter in adapters)):
        if out.exists() and os.path.samefile(out, folder):
            raise FileError(f"{out} is a folder that is read: name another one for the result")


def _check_space(out: Path, needed: int) -> None:
    free = free_bytes(out)
    if needed > free:
        raise JobError(
            f"{out} needs {needed / 2**20:,.0f} MiB, and its disk has {free / 2**20:,.0f} MiB free: make room, and run the same "
            "command again"
        )


def _inputs(base: BaseModel, adapters: list[Adapter], small: list[str]) -> list[Path]:
    folder = base.folder
    index = [folder / INDEX] if base.sharded else []
    files = [folder / name for name in (*base.files, *small)]
    return [folder / CONFIG, *index, *files, *(path for adapter in adapters for path in adapter.files)]


def _report(out: Path, plan: Plan, adapters: list[Adapter]) -> MergeReport:
    whole = [job for job in plan.jobs if any(job.source.path == adapter.file.path for adapter in adapters)]
    return MergeReport(
        out,
        files=[shard.name for shard in plan.shards],
        tensors=len(plan.jobs),
        merged=sum(1 for job in plan.jobs if job.additions),
        replaced=len(whole),
        total_bytes=plan.nbytes,
    )
