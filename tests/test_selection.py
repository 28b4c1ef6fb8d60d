# SPDX-License-Identifier: Apache-2.0
"""A change runs the long tests of what it touches, and a week runs them all."""

from __future__ import annotations

import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest
import selection
from error_messages import ROOT

LONG = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.long" in path.read_text()]
LONG += [*(ROOT / "tests" / "cuda_on_cpu").glob("test_*.py"), *(ROOT / "tests").glob("test_build_[stw]*.py")]


@pytest.mark.parametrize(
    ("changed", "areas"),
    [
        ("csrc/cuda/expand.cuh", {"CUDA on the CPU", "builds"}),
        ("csrc/cpu/forward.cpp", {"builds"}),
        ("tests/cuda_on_cpu/planted.py", {"CUDA on the CPU"}),
        ("tests/engines/rows_ddp.py", {"engines"}),
        ("gralora_ext/checkpoint/merging.py", {"files"}),
        ("gralora_ext/cli/job.py", {"job"}),
        ("docs/how/cpu.md", set()),
        ("tests/test_licence.py", set()),
    ],
)
def test_a_change_touches_its_areas(changed, areas):
    assert set(selection.areas_of_changes([changed])) == areas


@pytest.mark.parametrize(
    "changed", ["tests/conftest.py", "gralora_ext/_checks.py", "scripts/test.sh", ".ci/run", "new/file.py"]
)
def test_what_is_of_no_area_touches_all(changed):
    assert set(selection.areas_of_changes(["README.md", changed])) == set(selection.AREAS)


def test_every_pattern_matches_something():
    patterns = {p for area in selection.AREAS.values() for p in area.tests + area.sources} | set(
        selection.NO_LONG_TESTS
    )
    assert [p for p in sorted(patterns) if not any(ROOT.glob(p.removesuffix("/")))] == []


def test_every_file_of_long_tests_has_an_area():
    assert len(LONG) > 15
    for path in LONG:
        if path.name != Path(__file__).name:
            assert selection.area_of(path.relative_to(ROOT).as_posix()) in selection.AREAS


def test_a_week_takes_every_test_once():
    days = [date(2026, 12, 30) + timedelta(days=n) for n in range(selection.DAYS)]
    for n in range(50):
        nodeid = f"tests/test_a.py::test_{n}"
        assert sum(selection.in_sample(nodeid, day) for day in days) == 1
        assert selection.in_sample(nodeid, days[0]) == selection.in_sample(nodeid + "[1-2]", days[0])
    sizes = [sum(selection.in_sample(f"t::{n}", day) for n in range(700)) for day in days]
    assert 50 < min(sizes) and max(sizes) < 150


def test_changes_are_those_since_the_commit_committed_or_not(tmp_path):
    def git(*arguments: str) -> str:
        own = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", tmp_path, *own, *arguments], check=True, capture_output=True, text=True
        ).stdout

    assert selection.changed_files("HEAD", tmp_path) is None
    git("init", "--quiet")
    for name in ("kept", "edited", "moved", "committed"):
        (tmp_path / name).write_text(name)
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    first = git("rev-parse", "HEAD").strip()
    assert selection.changed_files(first, tmp_path) == set()
    (tmp_path / "committed").write_text("anew")
    git("commit", "--quiet", "-am", "second")
    (tmp_path / "edited").write_text("anew")
    git("mv", "moved", "elsewhere")
    (tmp_path / "new").touch()
    assert selection.changed_files(first, tmp_path) == {"committed", "edited", "moved", "elsewhere", "new"}
    for unknown in (None, "", "no-such-commit"):  # there is no origin/main
        assert selection.changed_files(unknown, tmp_path) is None
    git("update-ref", "refs/remotes/origin/main", first)
    assert selection.changed_files(None, tmp_path) == {"committed", "edited", "moved", "elsewhere", "new"}


def test_a_run_takes_what_the_selection_says_and_tells_what_it_left_out():
    def collected(*arguments: str) -> str:
        pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
        command = [*pytest_, *arguments, "tests/test_checkpoint_resume.py"]
        return subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout

    nothing_known = collected("--tests", "changed", "--since", "")
    everything = collected("--tests", "all")
    assert "[20]" in nothing_known
    assert "[100]" in everything and "[100]" not in nothing_known
    assert "left out without --all" in everything
