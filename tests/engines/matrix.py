# SPDX-License-Identifier: Apache-2.0
"""The engine matrix: every engine with PEFT's LoRA, PEFT's GraLoRA and ours, as a table.

usage: python tests/engines/matrix.py [--engines NAME ...] [--rows REGEX] [--table FILE.md]

A row is right where our layer is at least as good as PEFT's own GraLoRA layer: in float32 within
1e-5 of one process without the engine, in bfloat16 within twice the error of PEFT's layer; with no
more graphs, graph breaks or warnings; and with an error only where PEFT's layer has one too. The
exit code is 1 where a row is not right.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
TUNERS = {"lora": "LoRA", "peft": "PEFT's GraLoRA", "ours": "gralora_ext"}
LIMIT = 1e-5  # of the relative difference of losses and gradients in float32: rounding, and no more
SECONDS = 1200

Results = dict[str, dict[str, dict[str, Any]]]  # by row, then by tuner


class Engine(NamedTuple):
    """An engine as the table calls it, its processes, and the packages that it needs beside those of the tests."""

    title: str
    processes: int = 1
    packages: tuple[str, ...] = ()


ENGINES = {
    "ddp": Engine("DistributedDataParallel", 2),
    "fsdp1": Engine("FullyShardedDataParallel (FSDP1), PEFT's `fsdp_auto_wrap_policy`", 2),
    "fsdp2": Engine("`fully_shard` (FSDP2)", 2),
    "deepspeed": Engine("DeepSpeed", 2, ("deepspeed",)),
    "trainers": Engine("Trainers", 1, ("trl", "lightning")),
    "offload": Engine("Accelerate"),
    "checkpointing": Engine("Activation checkpointing"),
    "autocast": Engine("bfloat16"),
    "compile": Engine("`torch.compile`"),
    "export": Engine("`torch.export`, AOTInductor"),
    "func": Engine("`torch.func`"),
    "inspection": Engine("Counting, tracing, copying"),
    "quantized": Engine("Quantized base models", 1, ("bitsandbytes", "torchao", "hqq")),
}


def run(engine: str, rows: str = "", tuners: tuple[str, ...] = tuple(TUNERS), log: Path | None = None) -> Results:
    """The outcomes of the engine's rows whose name ``rows``, a regular expression, is found in."""
    paths = [str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    launcher = [sys.executable]
    if ENGINES[engine].processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ENGINES[engine].processes)]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        file.write_text("{}")
        command = [*launcher, str(HERE / "worker.py"), engine, str(file), rows, ",".join(tuners)]
        while True:
            before = file.read_text()
            done, output = _run(command, environment)
            if log is not None:
                with log.open("a") as stream:
                    stream.write(output)
            if done:
                return json.loads(file.read_text())
            if file.read_text() == before:
                raise RuntimeError(f"{engine}: the worker could not begin:\n{output[-3000:]}")


def _run(command: list[str], environment: dict[str, str]) -> tuple[bool, str]:
    """Whether a worker has run all rows, and what it has printed.

    It is killed with all it has started where it takes too long.
    """
    worker = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output = worker.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        output = worker.communicate()[0]
    return worker.returncode == 0, output


def what_is_wrong(row: str, outcomes: dict[str, dict[str, Any]]) -> str | None:
    """Why our layer is not as good as PEFT's in this row; None where it is."""
    ours, pefts = outcomes["ours"], outcomes.get("peft")
    if not ours["ok"]:
        return f"an error: {ours['error']}" if pefts is None or pefts["ok"] else None
    limit = LIMIT
    if "bf16" in row and pefts is not None and pefts["ok"]:
        limit = 2 * pefts["difference"]
    if not ours["difference"] <= limit:
        return f"a difference of {ours['difference']:.1e}, and {limit:.1e} is allowed"
    if ours["count"] is not None and pefts is not None and pefts["ok"] and ours["count"] > pefts["count"]:
        return f"{ours['note']}, and {pefts['note']} with PEFT's layer"
    return None


def _cell(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "–"
    if outcome["ok"]:
        parts = [f"{outcome['difference']:.1e}" if outcome["difference"] else "0", outcome["note"]]
        text = ", ".join(filter(None, parts))
    else:
        text = "**" + re.split(r"(?<=\w)[.;]\s|\n", outcome["error"])[0][:160] + "**"
    return text.replace("|", "\\|").replace("\n", " ")


def table(matrix: dict[str, Results]) -> str:
    """The matrix as Markdown."""
    names = ("torch", "peft", "transformers", "accelerate", *sorted({p for e in ENGINES.values() for p in e.packages}))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names if find_spec(name))
    lines = [
        "# Engines",
        "",
        "Written by `scripts/engines.sh`. A number is the largest relative difference of losses and adapter gradients,",
        "over three steps of a small Llama, from one process without the engine in float32 (GraLoRA: with PEFT's own",
        "layer). Bold is an error. A row is ok where our layer is at least as good as PEFT's: float32 to 1e-5, bf16 below",
        "twice the error of PEFT's layer, no more graphs or warnings, an error only where PEFT's has one.",
        "",
        f"Two gloo processes on the CPU where an engine has several. {versions}.",
    ]
    for engine, results in matrix.items():
        titles = " | ".join(TUNERS.values())
        lines += ["", f"## {ENGINES[engine].title}", "", f"| row | {titles} | |", "| --- | --- | --- | --- | --- |"]
        for row, outcomes in results.items():
            cells = " | ".join(_cell(outcomes.get(tuner)) for tuner in TUNERS)
            lines.append(f"| {row} | {cells} | {'**worse**' if what_is_wrong(row, outcomes) else 'ok'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the engine matrix and writes its table.")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME")
    parser.add_argument("--rows", default="", help="a regular expression: only rows whose name it is found in")
    parser.add_argument("--table", type=Path, help="the Markdown file to write")
    parser.add_argument("--log", type=Path, help="a file to which all that the engines print is added")
    arguments = parser.parse_args()
    matrix, wrong = {}, 0
    for engine in arguments.engines:
        matrix[engine] = run(engine, arguments.rows, log=arguments.log)
        for row, outcomes in matrix[engine].items():
            reason = what_is_wrong(row, outcomes)
            wrong += reason is not None
            print(f"{engine}: {row}: {'ok' if reason is None else reason}", flush=True)
    if arguments.table:
        arguments.table.write_text(table(matrix))
    print(
        f"{wrong} rows are not as good as PEFT's layer" if wrong else "all rows are as good as PEFT's layer, or better"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
