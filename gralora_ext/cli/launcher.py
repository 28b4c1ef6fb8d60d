# SPDX-License-Identifier: Apache-2.0
"""Which of a job's processes this one is, as its launcher tells in environment variables. Needs no torch."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ..program.errors import JobError

# The variables of torchrun and accelerate, Open MPI, MPICH and Intel MPI, and MVAPICH. They tell how
# many processes there are, which of them this one is, and which of those on this machine.
_VARIABLES = (
    ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)
LAUNCHED = "GRALORA_EXT_LAUNCHED"  # set by our own launcher, which then speaks for processes that cannot

_PR_SET_PDEATHSIG = 1  # of sys/prctl.h: the signal that a process gets when the one that started it dies


@dataclass(frozen=True)
class Place:
    """``rank`` of ``size`` processes, ``local_rank`` among those on this machine. The first one speaks and writes.

    ``of_torchrun``: torchrun started them all, on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    of_torchrun: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def of_our_launcher(self) -> bool:
        return LAUNCHED in os.environ


def place_here() -> Place:
    """This process's place; what torch.distributed asks for is then in the environment, whichever launcher it was."""
    found = _numbers(os.environ)
    if found is None or found["WORLD_SIZE"] == 1:
        return Place()
    for name, value in found.items():
        os.environ[name] = str(value)
    if "MASTER_ADDR" not in os.environ:
        if "RANK" in found and found["LOCAL_RANK"] != found["RANK"]:
            raise JobError("MASTER_ADDR is not set, and there are several machines: set it to the first one's address")
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", "29500")
    here = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == str(found["WORLD_SIZE"])
    by_accelerate = any(name.startswith("ACCELERATE_") for name in os.environ)
    return Place(found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], here and not by_accelerate)


def end_with_launcher() -> None:
    """Our own launcher's processes are not left behind where it is killed. Linux only."""
    if LAUNCHED in os.environ and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def engine(place: Place) -> str:
    """How the processes share the model, as Accelerate's variables say: ``ddp``, ``fsdp2`` or ``deepspeed``."""
    deepspeed, fsdp = _is_on("ACCELERATE_USE_DEEPSPEED"), _is_on("ACCELERATE_USE_FSDP")
    if (deepspeed or fsdp) and place.size == 1:
        raise JobError("accelerate's configuration shares a model out, and there is one process: start two or more")
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise JobError("accelerate's configuration asks for FSDP 1: set fsdp_version: 2 in its fsdp_config")
    return "deepspeed" if deepspeed else "fsdp2" if fsdp else "ddp"


def who() -> str:
    """Which process speaks, where it is not the only or the first one: to be put before an error."""
    try:
        place = place_here()
    except JobError:
        return ""
    return "" if place.is_first else f"process {place.rank} of {place.size}: "


def again(words: list[str], place: Place) -> str:
    """The command that starts as many processes as there are now on ``words``, as far as this one can know it."""
    python, program = shlex.quote(sys.executable), f"-m gralora_ext {shlex.join(words)}"
    if place.of_torchrun:
        return f"{python} -m torch.distributed.run --nproc-per-node {place.size} {program}"
    return f"<your launcher> {program}"


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def _numbers(environment: Mapping[str, str]) -> dict[str, int] | None:
    for names in _VARIABLES:
        if not environment.get(names[0], "").isdecimal():
            continue
        size = int(environment[names[0]][:9])
        if size == 1:
            return {"WORLD_SIZE": 1}
        rank, local = (environment.get(name, "") for name in names[1:])
        if not rank.isdecimal() or int(rank[:9]) >= size:
            raise JobError(
                f"{names[0]} is {size}, and {names[1]} is {rank or 'not set'}, which is not one of them: start the job "
                f"with --num-processes or torchrun, or unset {names[0]}"
            )
        return {
            "WORLD_SIZE": size,
            "RANK": int(rank[:9]),
            "LOCAL_RANK": int(local[:9]) if local.isdecimal() else int(rank[:9]),
        }
    return None
