# SPDX-License-Identifier: Apache-2.0
"""What the scripts install, they install once, and again where anything has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from error_messages import ROOT

SETUP = ROOT / "scripts" / "_setup.sh"


def bash(program: str, environment: Path, **variables: str) -> str:
    """The output of ``program``, after the functions of the scripts, with ``environment`` active."""
    done = subprocess.run(
        ["bash", "-c", f'source "{SETUP}"\n{program}'],
        env={**os.environ, "VIRTUAL_ENV": str(environment), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    return tmp_path / "environment"


def test_what_is_installed_is_not_installed_again(environment):
    bash('choose_environment; fingerprint finetune >"$environment/.gralora_ext-finetune"', environment)
    assert bash("set_up finetune", environment) == f"== all is installed in {environment}\n"


def test_an_environment_that_is_there_keeps_what_it_holds(tmp_path):
    """uv makes environments without pip."""
    scripts = tmp_path / "checkout" / "scripts"
    scripts.mkdir(parents=True)
    shutil.copy(SETUP, scripts)
    mine = scripts.parent / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", mine], check=True)
    package = Path(sysconfig.get_path("purelib", vars={"base": str(mine)})) / "mine.py"
    package.write_text("")
    program = f'source "{scripts / SETUP.name}"; choose_environment; "$python" -m pip --version'
    without = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(["bash", "-c", program], env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("pip "), done
    assert package.exists()
    (mine / "bin" / "python").unlink()
    done = subprocess.run(["bash", "-c", program], env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"no Python runs in {mine}: remove that folder" in done.stderr, done
    assert package.exists()


def test_another_build_in_the_source_tree_installs_again(environment, tmp_path):
    scripts = tmp_path / "checkout" / "scripts"
    shutil.copytree(ROOT / "gralora_ext", scripts.parent / "gralora_ext", ignore=shutil.ignore_patterns("_C.*.so"))
    (scripts.parent / "csrc").mkdir()
    scripts.mkdir()
    shutil.copy(SETUP, scripts)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, scripts.parent)
    (scripts.parent / "csrc" / "a.cpp").write_text("int a;")
    program = f'source "{scripts / SETUP.name}"; choose_environment; fingerprint finetune'
    seen = []
    for content in (b"one", b"another", b"one"):
        (scripts.parent / "gralora_ext" / "_C.cpython-311-x86_64-linux-gnu.so").write_bytes(content)
        seen.append(bash(program, environment))
    assert seen[0] == seen[2] != seen[1]


def test_any_change_installs_again(environment):
    def fingerprint(extra: str = "finetune", **variables: str) -> str:
        return bash(f"choose_environment; fingerprint {extra}", environment, **variables)

    before = fingerprint()
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "torch-2.99.dist-info").mkdir()
    seen = [before, fingerprint(), fingerprint("test"), fingerprint(GRALORA_EXT_CUDA="0"), fingerprint(CXXFLAGS="-O1")]
    assert len(set(seen)) == len(seen)
    (packages / "torch-2.99.dist-info").rmdir()
    assert fingerprint() == before
