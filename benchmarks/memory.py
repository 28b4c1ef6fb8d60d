# SPDX-License-Identifier: Apache-2.0
"""Memory in training: what a layer keeps alive for backward, and how far a call raises the peak of a process."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_ext.program.errors import JobError

from . import contenders as peers
from . import path
from .bench import Bench, Context, Level, Skip, Task
from .contenders import Data
from .results import Record
from .shapes import SMALL, SQUARE, Shape
from .timing import Contender


def saved_bytes(call: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd saves during ``call``, each counted once, without those of ``known``.

    A view counts with the whole storage that it keeps alive.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # kept until the end, since a freed storage's address can come again
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


def peak_bytes(contender: Contender, device: torch.device) -> int:
    """How far one call raises the memory held: resident memory of this process, or the allocator's on a GPU.

    It should be the first call of its size in the process: memory that a library keeps for its next
    call then counts.

    Raises:
        Skip: the system does not let a process reset its peak.
    """
    if contender.prepare is not None:
        contender.prepare()
    return (_cuda_rise if device.type == "cuda" else _resident_rise)(contender)


def _resident_rise(contender: Contender) -> int:
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise Skip(f"it needs Linux and a writable /proc/self/clear_refs ({error})") from None
    before = _status("VmRSS")
    contender.call()
    return max(0, _status("VmHWM") - before)


def _cuda_rise(contender: Contender) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.call()
    return torch.cuda.max_memory_allocated() - before


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


# The peak of each contender, in child processes that run nothing else: all contenders in one, one
# after another, but `ours-op`, which has a child to itself. The environment makes malloc return
# every freed tensor to the system at once, so that resident memory is what is in use, and the peak
# is reset before each. A tiny call of each contender comes first: what libraries load and set up
# once is not counted.

MERGED = ("ours", "peft", "lora")
SECONDS = 10.0  # for the estimate: starting Python with torch and PEFT, twice
TINY = Shape(24, 36, T=3, r=4)


def peaks(what: str, shape: Shape, device: torch.device, threads: int) -> dict[str, int]:
    """Bytes by which a ``"training"`` call or a ``"merge"`` raises the peak, by contender.

    Two children: the operation would find the memory that our layer has kept, which it needs as
    well.

    Raises:
        Skip: a child cannot measure here.
        JobError: a child failed.
    """
    alone = ["ours-op"] if what == "training" else []
    together = [name for name in contenders(what, TINY, device) if name not in alone]
    request = {"what": what, "shape": asdict(shape), "device": device.type, "threads": threads}
    return {name: value for names in (together, alone) if names for name, value in _child(request, names).items()}


def _child(request: dict[str, Any], names: list[str]) -> dict[str, int]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "MALLOC_MMAP_THRESHOLD_": str(64 << 10),
    }
    command = [sys.executable, "-m", __spec__.name, json.dumps({**request, "names": names})]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise JobError(f"the process that measures memory failed with exit code {child.returncode}: {last}")
    answer = json.loads(child.stdout.splitlines()[-1])
    if "skip" in answer:
        raise Skip(answer["skip"])
    return answer


def contenders(what: str, shape: Shape, device: torch.device) -> dict[str, Contender]:
    """Those whose peak is measured."""
    data = Data(shape, device)
    if what == "merge":
        return peers.merges(peers.layers(data, *MERGED))
    return {name: Contender(partial(path.train, peer, data)) for name, peer in peers.paths(data).items()}


def main(request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    tiny = contenders(request["what"], TINY, device)
    measured = contenders(request["what"], Shape(**request["shape"]), device)
    try:
        for name in request["names"]:
            peak_bytes(tiny[name], device)
        return {name: peak_bytes(measured[name], device) for name in request["names"]}
    except Skip as reason:
        return {"skip": str(reason)}


# The bench

NAME = "memory"
SHAPES = {
    "tiny": [Shape(24, 36, T=3, r=4)],
    "quick": [replace(SQUARE, T=2048)],
    "default": [
        replace(SQUARE, T=2048),
        replace(SQUARE, T=2048, activation="bf16"),
        replace(SQUARE, T=2048, dropout=0.1),
        Shape(4096, 14336, T=2048),
    ],
    "full": [
        *(replace(s, T=2048, activation=a, h=h) for s in (SMALL, SQUARE) for a in ("fp32", "bf16") for h in (0, 16)),
        replace(SQUARE, T=2048, dropout=0.1),
        replace(SQUARE, T=2048, r=128, k=8),
        *(Shape(n, m, T=2048) for n, m in ((4096, 14336), (14336, 4096))),
    ],
}


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    return [Task(f"{NAME}: {shape.key}", SECONDS, partial(measure, shape)) for shape in SHAPES[level.name]]


def measure(shape: Shape, context: Context) -> Iterator[Record]:
    yield _record("kept", shape, kept_bytes(Data(shape, context.device)))
    try:
        yield _record("peak", shape, peaks("training", shape, context.device, context.threads))
    except Skip as reason:
        context.skipped["peak memory"] = str(reason)


def kept_bytes(data: Data) -> dict[str, int]:
    """What each whole layer keeps alive for backward beside its weights, by contender.

    x counts where autograd saves it: a frozen layer alone saves its weight and nothing else.
    """
    kept = {}
    for name, layer in peers.layers(data, "base", "ours", "ours-path", "peft", "lora").items():
        kept[name] = saved_bytes(partial(layer, data.x), layer.parameters())
    return kept


def _record(what: str, shape: Shape, values: dict[str, int]) -> Record:
    samples = {name: [float(value)] for name, value in values.items()}
    return Record(NAME, f"{what} {shape.key}", "bytes", samples, {**asdict(shape), "what": what})


BENCH = Bench(NAME, "Kept alive for backward by a layer; peak of forward + backward of the adapter path", tasks)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
