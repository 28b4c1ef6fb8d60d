# SPDX-License-Identifier: Apache-2.0
"""``scripts/gpu_check.sh`` and its report, with stand-ins for the card and for what runs on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
BASH = shutil.which("bash")
STEPS = ["selftest", "tests", "autocast", "memcheck", "racecheck", "initcheck", "synccheck", "benchmarks"]

# In place of Python: the report is made in earnest, and the rest says what it would say on a card.
PYTHON = """#!/bin/sh
case "$*" in
*gpu_report.py*) exec {python} "$@" ;;
*get_device_name*) echo "NVIDIA Card 9" ;;
*torch.__version__*) echo "torch: 2.13.0 for CUDA 13.0" ;;
*--selftest*) echo "NVIDIA Card 9 (cuda:0) is trustworthy" ;;
*"-k autocast"*) echo "the autocast test"; exit {autocast} ;;
*"-m pytest"*) echo "12 passed" ;;
*"-m benchmarks"*) for folder; do :; done; cp {results} "$folder/results.json" ;;
esac
"""
NVIDIA_SMI = """#!/bin/sh
case "$*" in *query*) echo "NVIDIA Card 9, 580.65, 81559 MiB" ;; *) echo "| NVIDIA-SMI |" ;; esac
"""


def record(bench: str, key: str, roofline: float | None, **ratios: float) -> dict[str, Any]:
    return {"bench": bench, "key": key, "contenders": {"ours": {"roofline": roofline}}, "ratios": ratios}


RESULTS = {
    "complete": True,
    "failed": {"step T=1": "RuntimeError: too slow"},
    "records": [
        record("forward", "T=1", 0.08, peft=0.5, lora=1.25),
        record("forward", "T=16", 0.3, peft=0.75, lora=1.125),
        record("memory", "T=16", None, peft=0.1),
    ],
}


def check(folder: Path, *, autocast: int = 0, sanitizer: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the script; its results go to ``folder / "out"``."""
    programs = {"environment/bin/python": PYTHON, "bin/nvidia-smi": NVIDIA_SMI}
    if sanitizer:
        programs["bin/compute-sanitizer"] = "#!/bin/sh\necho no error in $2\n"
    (folder / "results.json").write_text(json.dumps(RESULTS))
    values = {"python": sys.executable, "autocast": autocast, "results": folder / "results.json"}
    for name, text in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.format(**values) if name.endswith("python") else text)
        (folder / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder / "environment")}
    command = [BASH, str(SCRIPTS / "gpu_check.sh"), str(folder / "out")]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


needs_bash = pytest.mark.skipif(BASH is None, reason="there is no bash")


@needs_bash
def test_a_card_on_which_all_is_well_gets_a_page_that_says_so(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "REPORT.md").read_text()
    assert page.startswith(
        f"# GPU check: all {len(STEPS)} steps passed\n\n- card, driver, memory: NVIDIA Card 9, 580.65, 81559 MiB\n"
        "- torch: 2.13.0 for CUDA 13.0\n- commit: "
    )
    places = [page.index(f"| {step} | passed | 0.0 |") for step in STEPS]
    assert places == sorted(places)
    assert "## selftest: passed\n\n```\nNVIDIA Card 9 (cuda:0) is trustworthy\n```" in page
    assert "no error in memcheck" in page
    for name in (*(f"{step}.txt" for step in STEPS), "machine.txt", "results.json", "REPORT.md"):
        assert (tmp_path / "out" / name).is_file() and name in page.splitlines()[-3]
    assert "have not run on a GPU yet" in page  # what the documents say until then
    assert len(page.splitlines()) < 100


@needs_bash
def test_a_step_that_failed_comes_first_and_the_others_go_on(tmp_path: Path) -> None:
    done = check(tmp_path, autocast=3)
    assert done.returncode == 1 and "failed: autocast (see " in done.stdout
    page = (tmp_path / "out" / "REPORT.md").read_text()
    assert page.startswith(f"# GPU check: 1 of {len(STEPS)} steps failed")
    assert "| autocast | **failed** (exit code 3) | 0.0 |" in page and "| benchmarks | passed |" in page
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings[:2] == ["## autocast: **failed** (exit code 3)", "## selftest: passed"]
    assert "- Read autocast.txt." in page and "failed steps included" in page and "have not run" not in page


@needs_bash
def test_a_missing_tool_is_a_step_that_failed(tmp_path: Path) -> None:
    if shutil.which("compute-sanitizer"):
        pytest.skip("there is one")
    assert check(tmp_path, sanitizer=False).returncode == 1
    assert (
        "| compute-sanitizer | **failed** (exit code 127: not found) |" in (tmp_path / "out" / "REPORT.md").read_text()
    )


@needs_bash
def test_the_weakest_results_are_on_the_page(tmp_path: Path) -> None:
    check(tmp_path)
    page = (tmp_path / "out" / "REPORT.md").read_text()
    rows = [line for line in page.splitlines() if line.endswith(("| T=1 |", "| T=16 |"))]
    assert rows == [
        *("| forward | lora | 1.25 | T=1 |", "| forward | peft | 0.75 | T=16 |", "| memory | peft | 0.10 | T=16 |"),
        "| forward | 8.0% | T=1 |",
    ]
    assert "- **failed**: step T=1: RuntimeError: too slow" in page


def test_a_folder_without_anything_gets_a_page_too(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPTS / "gpu_report.py", tmp_path], check=True)
    page = (tmp_path / "REPORT.md").read_text()
    assert "no facts of the machine were found" in page and "There are no results." in page
