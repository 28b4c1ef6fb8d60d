# SPDX-License-Identifier: Apache-2.0
"""Runs rows of one engine in this process, or in all processes that torchrun has started, and writes what came of each.

usage: worker.py ENGINE RESULTS.json ROWS TUNERS     ROWS: a regular expression; TUNERS: names, with commas between

What the results hold already is left out. After an error the worker ends with 1, since an engine
may be in any state then, and is to be started again; it ends with 0 when all is done.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch


def outcome(row: Any, tuner: str) -> dict[str, Any]:
    try:
        return {"ok": True, **dataclasses.asdict(row(tuner))}
    except Exception as error:  # noqa: BLE001  whatever an engine raises is the row's result
        traceback.print_exc()
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def main() -> int:
    engine, file, pattern, tuners = sys.argv[1:5]
    several = "WORLD_SIZE" in os.environ
    if several:
        torch.distributed.init_process_group("gloo")
    writes = not several or torch.distributed.get_rank() == 0
    path = Path(file)
    results = json.loads(path.read_text())
    rows = importlib.import_module(f"rows_{engine}").ROWS
    if several:
        torch.distributed.barrier()  # all have read before one writes
    for name, row in rows.items():
        for tuner in tuners.split(","):
            without = tuner == "lora" and "hybrid" in name  # LoRA has no hybrid part
            if not re.search(pattern, name) or without or tuner in results.get(name, {}):
                continue
            results.setdefault(name, {})[tuner] = {"ok": False, "error": "the process died, or took too long"}
            if writes:
                path.write_text(json.dumps(results))
            torch.manual_seed(0)
            torch.compiler.reset()  # what is compiled, and which sizes are taken for dynamic, is no row's inheritance
            results[name][tuner] = outcome(row, tuner)
            if writes:
                path.write_text(json.dumps(results))
            if not results[name][tuner]["ok"]:
                return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # nothing that an engine has started, and no process that waits for another, keeps this one alive
