"""The peak memory of each contender, measured in a process of its own: what ran before in another does not blur it.

The environment makes malloc return every freed tensor to the system at once, so that resident memory is what is in use. A
tiny call of each contender comes first: what libraries load and set up once is not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from gralora_ext.cli.errors import JobError

from . import layer_path, merging
from .data import Data
from .errors import Skip
from .memory import peak_bytes
from .peers import paths
from .shapes import Shape
from .timing import Contender

SECONDS = 10.0  # for the estimate: starting Python with torch and PEFT, twice
TINY = Shape(24, 36, T=3, r=4)


def peaks(what: str, shape: Shape, device: torch.device, threads: int) -> dict[str, int]:
    """Bytes by which a ``"training"`` call or a ``"merge"`` raises the peak, by contender.

    Two children: the operation would find the memory that our layer has kept, which it needs as well.

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
        return merging.merges(merging.layers(data))
    return {name: Contender(partial(layer_path.train, path, data)) for name, path in paths(data).items()}


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


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
