# SPDX-License-Identifier: Apache-2.0
"""Merges in forked processes that die by SIGKILL; a program of its own, since a process with OpenMP threads cannot fork.

``python killed_merge.py BASE ADAPTER OUT calls STEP`` lets one die before each STEP-th of the calls that change the disk, and
the one that goes on at one of its first; ``… times COUNT SEED`` at random moments. Each merge is then run again to its end.
Prints a line for each: how often it died, and the SHA-256 of all files but the manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from gralora_ext.checkpoint import merge

CALLS = ("pwritev", "replace", "fsync", "unlink", "rmdir", "mkdir", "ftruncate", "posix_fadvise")


def die_before(last: int) -> None:
    """This process dies before its call of that number."""
    count = 0

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def run(arguments: list[Any], *, before: int = 0, after: float | None = None) -> bool:
    """Whether a merge in another process came to its end, and was not killed before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_before(before)
            merge(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the merge failed")
    return os.WIFEXITED(status)


def check_incomplete(out: Path) -> None:
    """Nothing takes the folder for a model's."""
    if (out / "config.json").exists() and not (out / "merge.json").exists():
        raise SystemExit("the folder looks complete before it is")


def digest(out: Path) -> str:
    value = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        value.update(path.relative_to(out).as_posix().encode())
        if path.name != "merge.json":
            value.update(path.read_bytes() if path.is_file() else b"")
    return value.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    *arguments, out = map(Path, sys.argv[1:4])
    how, numbers = sys.argv[4], [int(number) for number in sys.argv[5:]]
    arguments = [*arguments, out]
    if how == "calls":
        for before in itertools.count(1, numbers[0]):
            shutil.rmtree(out, ignore_errors=True)
            if run(arguments, before=before):
                return
            check_incomplete(out)
            again = run(arguments, before=1 + before % 8)  # the one that goes on dies too, early
            check_incomplete(out)
            if not again:
                run(arguments)
            print(2 - again, digest(out), flush=True)
    count, seed = numbers
    rng = random.Random(seed)
    start = time.perf_counter()
    run(arguments)
    took = time.perf_counter() - start
    died = 0
    while died < count:
        shutil.rmtree(out, ignore_errors=True)
        tries = 0
        while not run(arguments, after=rng.uniform(0, took)):
            tries += 1
            check_incomplete(out)
        died += tries
        print(tries, digest(out), flush=True)


main()
