"""Runs rows of one engine in this process, or in all processes that torchrun has started, and writes what came of each.

usage: [torchrun ...] worker.py ENGINE RESULTS.json CELL ...     CELL: a row's name, a colon, a tuner

After an error the worker ends, since an engine may be in any state then: its starter goes on with a new one.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch


def outcome(row: Any, tuner: str) -> dict[str, Any]:
    try:
        return {"ok": True, **dataclasses.asdict(row(tuner))}
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def main() -> None:
    engine, results, *cells = sys.argv[1:]
    module = importlib.import_module(f"rows_{engine}")
    several = "WORLD_SIZE" in os.environ
    if several:
        torch.distributed.init_process_group("gloo")
    for cell in cells:
        name, tuner = cell.rsplit(":", 1)
        torch.manual_seed(0)
        result = outcome(module.ROWS[name], tuner)
        if not several or torch.distributed.get_rank() == 0:
            path = Path(results)
            path.write_text(json.dumps({**json.loads(path.read_text()), cell: result}))
        if not result["ok"]:
            break
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # engines' threads and the other process, which may wait for this one, keep nothing alive


if __name__ == "__main__":
    main()
