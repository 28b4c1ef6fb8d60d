# SPDX-License-Identifier: Apache-2.0
"""Which of the long tests a run takes: those of what has changed, and of the others a sample that rotates by date.

A test that is marked ``long`` belongs to the area whose files of tests hold it. An area is run whole where one of
its sources or tests differs from the commit that was checked last, and where that cannot be known. Of every other
area each day takes one seventh, so that a week takes all.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DAYS = 7


class Area(NamedTuple):
    """Patterns of paths. One that ends in "/" means all that is below it; "*" stands for a part of one name."""

    tests: tuple[str, ...]
    sources: tuple[str, ...]


GLUE = ("csrc/*.cpp", "csrc/*.h")
LOADING = ("gralora_ext/_build_*.py", "gralora_ext/_jit.py", "gralora_ext/_loader.py")
LAYERS = ("gralora_ext/tuner/", "gralora_ext/ops.py", "gralora_ext/_registrations.py")
AREAS = {
    "CUDA on the CPU": Area(
        ("tests/cuda_on_cpu/",),
        (*GLUE, "csrc/cuda/", "gralora_ext/_build_*.py", "gralora_ext/selftest/", "gralora_ext/tolerances.py"),
    ),
    "builds": Area(
        ("tests/test_build_*.py", "tests/build_helpers.py"),
        ("csrc/", "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "tests/cpp/", *LOADING),
    ),
    "engines": Area(("tests/test_engines.py", "tests/engines/"), (*GLUE, *LAYERS)),
    "job": Area(
        ("tests/test_cli_*.py", "tests/cli_helpers.py", "tests/several_helpers.py", "tests/test_compare*.py"),
        (
            *("gralora_ext/cli/", "gralora_ext/program/", "gralora_ext/compare/", "gralora_ext/tuner/"),
            *("examples/", "docs/several_processes.md"),
        ),
    ),
    "files": Area(
        ("tests/test_checkpoint_*.py", "tests/checkpoint_helpers.py", "tests/test_benchmarks_*.py"),
        ("gralora_ext/checkpoint/", "gralora_ext/lora_factors.py", "gralora_ext/program/", "benchmarks/*.py"),
    ),
}
# No long test reads these: other documents, figures, and tests that always run.
NO_LONG_TESTS = (
    *("docs/", "benchmarks/results/", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "mkdocs.yml"),
    *(".gitignore", "tests/test_*.py"),
)


def matches(path: str, patterns: Iterable[str]) -> bool:
    return any(path.startswith(p) if p.endswith("/") else PurePosixPath(path).match(p) for p in patterns)


def area_of(path: str) -> str:
    """The area of the long tests in a file."""
    found = next((name for name, area in AREAS.items() if matches(path, area.tests)), None)
    if found is None:
        raise pytest.UsageError(f"{path} has tests marked long, but tests/selection.py names no area for it")
    return found


def areas_of_changes(changed: Iterable[str]) -> dict[str, str]:
    """The areas that are run whole, and why. What nobody knows to be of one area may matter to all of them."""
    why: dict[str, str] = {}
    for path in sorted(changed):
        touched = [name for name, area in AREAS.items() if matches(path, area.sources + area.tests)]
        if not touched and not matches(path, NO_LONG_TESTS):
            touched = list(AREAS)
        for name in touched:
            why.setdefault(name, path)
    return why


def changed_files(since: str | None, root: Path = ROOT) -> set[str] | None:
    """The files that differ from a commit, committed or not, or None where that cannot be known.

    since: a commit; None means where this branch has left ``origin/main``, and "" that no commit is known.
    """
    if since is None:
        since = git(root, "merge-base", "HEAD", "origin/main")
        since = since.strip() if since else None
    different = git(root, "diff", "--name-only", "--no-renames", "-z", since, "--") if since else None
    new = git(root, "ls-files", "--others", "--exclude-standard", "-z")
    if different is None or new is None:
        return None
    return set(filter(None, (different + new).split("\0")))


def git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def whole_areas(since: str | None) -> dict[str, str]:
    changed = changed_files(since)
    return (
        dict.fromkeys(AREAS, "the last checked commit is not known") if changed is None else areas_of_changes(changed)
    )


def in_sample(nodeid: str, day: date) -> bool:
    """Whether a test, with all its parameters, has its turn on a day."""
    turn = hashlib.sha256(nodeid.partition("[")[0].encode()).digest()[0]
    return (turn + day.toordinal()) % DAYS == 0


def left_out(items: Sequence[pytest.Item], whole: Iterable[str], day: date) -> dict[str, list[pytest.Item]]:
    """The tests that a run of what has changed leaves out, by area; "exhaustive" are those of every area."""
    found: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("exhaustive"):
            found["exhaustive"].append(item)
        elif item.get_closest_marker("long"):
            area = area_of(item.path.relative_to(ROOT).as_posix())
            if area not in whole and not in_sample(item.nodeid, day):
                found[area].append(item)
    return dict(found)
