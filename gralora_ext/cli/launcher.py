# SPDX-License-Identifier: Apache-2.0
"""Launchers such as torchrun: a job is one process until several are supported, and one of them says so."""

from __future__ import annotations

import os
import signal
import sys
import time

# Of torchrun and accelerate, MPI, and MVAPICH: how many processes there are, and which of them this
# one is.
_VARIABLES = (
    ("WORLD_SIZE", "RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)


def is_one_of_several() -> bool:
    return _processes()[1] > 1


def refuse_several() -> int:
    """The first process says what is the matter; the exit code of each is 2."""
    variable, size, rank = _processes()
    if rank == 0:
        print(
            f"gralora-ext: error: this is one of {size} processes ({variable}), and finetune runs in one only: "
            "start it without torchrun, accelerate launch or mpirun, or with one process",
            file=sys.stderr,
            flush=True,
        )
    else:
        # A launcher ends all processes as soon as one has ended: the first one shall have spoken by
        # then.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1.0)
    return 2


def _processes() -> tuple[str, int, int]:
    """The variable that tells, how many processes there are, and which one this is."""
    for size, rank in _VARIABLES:
        if os.environ.get(size, "").isdecimal():
            own = os.environ.get(rank, "")
            return size, int(os.environ[size][:9]), int(own[:9]) if own.isdecimal() else 0
    return "", 1, 0
