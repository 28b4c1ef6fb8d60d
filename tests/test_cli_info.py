# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext info``: what is built and in use, and what to do about what is missing."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from build_helpers import copy_package
from cli_helpers import call, environment, run

import gralora_ext


def test_info_prints_build_and_packages(tmp_path):
    result = call("info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.stdout.splitlines() if line.startswith("  ")}
    info = gralora_ext.build_info()
    assert lines["version"] == gralora_ext.__version__
    assert lines["build"] == info["build"] != "none"
    assert lines["cpu_capability"] == info["cpu_capability"]
    assert "transformers" in lines


def test_info_without_the_extension_tells_how_to_build_it(tmp_path):
    copy_package(tmp_path)
    env = environment(PYTHONPATH=str(tmp_path), GRALORA_EXT_JIT="0")
    command = [sys.executable, "-m", "gralora_ext"]
    info = subprocess.run([*command, "info"], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert info.returncode == 2 and info.stderr == ""
    assert "to mend" in info.stdout and "pip install --no-build-isolation ." in info.stdout
    (tmp_path / "d.jsonl").write_text('{"question": "q", "answer": "a"}\n' * 9)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    job = ("finetune", "--data", "d.jsonl", "--model", "model")
    job = subprocess.run([*command, *job], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert job.returncode == 2 and "--backend peft runs without it" in job.stderr
    assert len(job.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "flag", ["-m", *(pytest.param(f, marks=pytest.mark.exhaustive) for f in ("-um", "-Wdefault -m"))]
)
def test_a_package_that_imports_ours_runs_however_python_is_told(tmp_path, flag):
    """While Python looks for the main module, sys.argv has "-m" alone."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import gralora_ext\n")
    (tmp_path / "theirs" / "train.py").write_text("print('trained')\n")
    command = [sys.executable, *flag.split(), "theirs.train"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "trained\n", done.stderr


def test_version_and_help_need_no_heavy_import(tmp_path):
    code = (
        "import sys; sys.argv[0] = 'gralora-ext'; from gralora_ext.cli import main; "
        "code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    )
    cases = ((["--version"], gralora_ext.__version__), (["--help"], "finetune"))
    for arguments, text in (*cases, (["finetune", "--print-config"], '"lr": 0.001')):
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True)
        assert text in result.stdout and result.stdout.splitlines()[-1] == "0 False"


@pytest.mark.parametrize(
    ("words", "code", "seconds"),
    [
        (("--help",), 0, 1.0),
        (("finetune", "--help"), 0, 1.0),
        (("finetune", "--lrr", 1), 2, 2.0),
        (("finetune", "--num-processes", 2, "--lrr", 1), 2, 2.0),
    ],
)
@pytest.mark.parametrize("launched", [False, True])
def test_help_is_there_in_a_second_and_a_typo_is_answered_in_two(tmp_path, words, code, seconds, launched):
    """In the first of several processes too; the least of three tries, since the machine may be busy."""
    place = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"} if launched else {}
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        run(*words, cwd=tmp_path, code=code, env=environment(**place))
        taken.append(time.perf_counter() - start)
    assert min(taken) < seconds


def test_no_command_shows_the_usage(tmp_path):
    assert "usage: gralora-ext COMMAND" in run(cwd=tmp_path, code=2).stderr
