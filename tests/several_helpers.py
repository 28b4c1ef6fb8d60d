# SPDX-License-Identifier: Apache-2.0
"""What the tests of several processes share: the job, Accelerate's files, and signals to one of its processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cli_helpers import environment, finish, metrics
from error_messages import ROOT

# 37 rows to train on, 4 in a step: the tenth step is the last of an epoch, of one row, and a second
# process has none. No dropout, so that any number of processes computes the same.
JOB = ("finetune", "--model", "model", "--data", "data.jsonl", "--held-out", 11, "--r", 4, "--lr", 0.01)
JOB += ("--max-length", 64, "--hybrid-r", 2, "--eval-every", 4, "--save-every", 4, "--sample-tokens", 4, "--no-merge")
ONE, TWO = ("--batch-size", 4), ("--batch-size", 2)

EXAMPLES = ROOT / "examples"


def make_configurations(folder: Path) -> None:
    """Those of examples/, and one for ZeRO-2."""
    for name in ("fsdp2.yaml", "zero3.yaml"):
        shutil.copy(EXAMPLES / name, folder)
    zero3 = (folder / "zero3.yaml").read_text()
    (folder / "zero2.yaml").write_text(zero3.replace("zero_stage: 3", "zero_stage: 2"))


def start_several(
    *words: object, cwd: Path, launcher: tuple[str, ...] = ("-m", "gralora_ext"), devices: str = "", **options: Any
) -> subprocess.Popen[str]:
    """The job as a process that starts others; on the CPU, unless CUDA ``devices`` are named."""
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, words)],
        cwd=cwd,
        env=environment(GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES=devices),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def run_several(*words: object, cwd: Path, code: int = 0, **how: Any) -> subprocess.CompletedProcess[str]:
    result = finish(start_several(*words, cwd=cwd, **how))
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def rank_of(launcher: subprocess.Popen[str], rank: int, patience: float = 60.0) -> int:
    """The process of a rank among those that ``launcher`` has started."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={rank}".encode() in variables:
                return int(pid)
        time.sleep(0.02)
    raise AssertionError(f"there is no process of rank {rank}")


def signal_at(
    text: str, rank: int | None, signum: signal.Signals, *words: object, cwd: Path, delay: float = 0.0, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Sends ``signum`` to one process, ``delay`` seconds after a line of the job's output holds ``text``.

    Where ``rank`` is None it is sent to the process that has started the others.
    """
    process = start_several(*words, cwd=cwd, **how)
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            time.sleep(delay)
            try:
                os.kill(process.pid if rank is None else rank_of(process, rank, 1.0), signum)
            except (AssertionError, OSError):
                pass  # it has ended
            break
    return finish(process, read)


def losses(output: Path) -> list[float]:
    values = metrics(output)
    return [e["loss"] for name in ("losses", "eval_losses") for e in values[name]]


def tokens(output: Path) -> list[int]:
    return [e["tokens"] for e in metrics(output)["losses"]]


def far(ours: Path, theirs: Path) -> float:
    """The greatest difference of any loss, trained or held out."""
    pairs = zip(losses(ours), losses(theirs), strict=True)
    return max(abs(a - b) for a, b in pairs)
