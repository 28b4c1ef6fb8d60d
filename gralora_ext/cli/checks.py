# SPDX-License-Identifier: Apache-2.0
"""What must be in order before a job starts, and the little that depends on how and where the program runs."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path

from ..program.errors import JobError, first_sentence
from ..program.files import LOCK, PARTIAL
from .launcher import Place
from .option_table import BITSANDBYTES_OPTIMIZERS, REPORTERS
from .options import SETTINGS, bits_of
from .output import RECORD

NEEDED = ("torch", "transformers", "peft", "accelerate", "safetensors", "matplotlib", "tqdm")


def check_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise JobError(f"gralora-ext needs {', '.join(missing)}: `pip install {' '.join(missing)}`")


def check_output(folder: Path) -> None:
    """A folder that holds other things than an earlier job's is not ours to write into."""
    if folder.exists() and not folder.is_dir():
        raise JobError(f"--output: {folder} is not a folder")
    if folder.is_dir() and not (folder / SETTINGS).is_file():
        others = [
            p.name for p in sorted(folder.iterdir()) if p.name not in (LOCK, RECORD) and not p.name.startswith(PARTIAL)
        ]
        if others:
            raise JobError(f"--output: {folder} holds other files ({others[0]}), and is not of an earlier finetune job")
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise JobError(f"--output: {folder} cannot be written, since {existing} cannot")


def check_backend(backend: str) -> None:
    """That the layers can be built: PEFT has GraLoRA, and the extension loads."""
    import peft

    if backend != "lora" and not hasattr(peft, "GraloraConfig"):
        raise JobError(f"peft {peft.__version__} has no GraLoRA: `pip install -U peft`, or --backend lora")
    if backend == "fused":
        try:
            import gralora_ext.ops  # noqa: F401  loads the native extension
        except (ImportError, RuntimeError, ValueError) as error:
            raise JobError(f"{first_sentence(error, 600)} (--backend peft runs without it)") from error


def check_needed(options: argparse.Namespace) -> None:
    """That the packages are there which an option asks for."""
    needed: list[tuple[str, tuple[str, ...]]] = []
    if bits_of(options):
        needed.append((f"--load-in-{bits_of(options)}bit", ("bitsandbytes",)))
    if options.optim in BITSANDBYTES_OPTIMIZERS:
        needed.append((f"--optim {options.optim}", ("bitsandbytes",)))
    needed += [(f"--report-to {name}", REPORTERS[name]) for name in options.report_to or []]
    for option, packages in needed:
        if all(importlib.util.find_spec(name) is None for name in packages):
            raise JobError(f"{option} needs {packages[0]}: `pip install {packages[0]}`")


def device(options: argparse.Namespace, place: Place) -> str:
    """What ``--device`` says, or for auto ``cuda`` where it is there and the backend has kernels for it, else ``cpu``.

    Of several processes on a machine each has a CUDA device of its own.
    """
    kind = _kind_of_device(options)
    if options.fp16 and kind != "cuda":
        raise JobError("--fp16 needs a CUDA device, since only there losses are scaled: --bf16 works on the CPU")
    if kind == "cpu" or place.size == 1:
        return kind
    import torch

    if place.local_rank >= torch.cuda.device_count():
        raise JobError(
            f"there are {torch.cuda.device_count()} CUDA devices here, and more processes: start one for each, or "
            "--device cpu"
        )
    return f"cuda:{place.local_rank}"


def is_slow_in_bf16(options: argparse.Namespace, device: str) -> bool:
    """Whether the job multiplies in bfloat16 on a processor for which torch has only plain loops."""
    from ..kernels import torch_has_bf16_loops

    return device == "cpu" and (options.bf16 or options.dtype == "bf16") and torch_has_bf16_loops()


def _kind_of_device(options: argparse.Namespace) -> str:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise JobError("--device cuda: torch sees no CUDA device here")
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_shared(options: argparse.Namespace, engine: str) -> None:
    """That what a job asks for goes with a model of which each process has a share."""
    bits = bits_of(options)
    needs_whole_model = bits or options.optim in (*BITSANDBYTES_OPTIMIZERS, "adafactor")
    if engine != "ddp" and needs_whole_model:
        option = f"--load-in-{bits}bit" if bits else f"--optim {options.optim}"
        raise JobError(f"{option} needs a whole model in each process, and this is {engine}")


def quiet_libraries() -> None:
    """The job tells what it does in its own words; errors of the libraries still come through."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # torchao speaks to the last one when it is imported.
    for name in ("accelerate", "bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def command() -> str:
    """How this program was called, for the commands that it tells the user to type."""
    called = Path(sys.argv[0])
    if called.name != "gralora-ext":
        return f"{shlex.quote(sys.executable)} -m gralora_ext"
    found = shutil.which("gralora-ext")
    return "gralora-ext" if found and called.exists() and os.path.samefile(found, called) else shlex.quote(str(called))
