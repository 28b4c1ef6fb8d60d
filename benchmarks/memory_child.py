"""The peak memory of each contender, measured in a process of its own: what ran before in another does not blur it.

The environment makes malloc return every freed tensor to the system at once, so that resident memory is what is in use.
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

SECONDS = 5.0  # for the estimate: starting Python with torch and PEFT


def peaks(what: str, shape: Shape, device: torch.device, threads: int) -> dict[str, int]:
    """Bytes by which a ``"training"`` call or a ``"merge"`` raises the peak, by contender; runs the child.

    Raises:
        Skip: the child cannot measure here.
        JobError: the child failed.
    """
    request = {"what": what, "shape": asdict(shape), "device": device.type, "threads": threads}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "MALLOC_MMAP_THRESHOLD_": str(64 << 10),
    }
    command = [sys.executable, "-m", __spec__.name, json.dumps(request)]
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
    measured = contenders(request["what"], Shape(**request["shape"]), device)
    try:
        return {name: peak_bytes(contender, device) for name, contender in measured.items()}
    except Skip as reason:
        return {"skip": str(reason)}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
