# SPDX-License-Identifier: Apache-2.0
"""What the scripts install, they install once, and again where anything has changed."""

from __future__ import annotations

import os
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
