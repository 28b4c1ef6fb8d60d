# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests, and hypothesis' profiles.

``deterministic`` (the default) draws the same cases in every run; ``--hypothesis-profile explore`` draws new ones.
Which tests a run takes, ``--tests`` says; see ``selection.py``.
"""

from __future__ import annotations

import os
import random
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

# The benchmarks are not installed. Their folder comes last, so that what is installed is tested.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# A thread that spins on a busy machine takes the time of the one it waits for. OpenMP reads this
# when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import build_helpers
import pytest
import selection
import torch
from hypothesis import Phase, settings

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("deterministic")


def pytest_addoption(parser: pytest.Parser) -> None:
    where = "where operations and layers are tested; emulated: by the CUDA kernels, on the CPU"
    parser.addoption("--device", choices=("cpu", "cuda", "emulated"), default="cpu", help=where)
    most = "run at most N cases of each test, drawn at random, and the same ones each time"
    parser.addoption("--most-cases", type=int, metavar="N", help=most)
    which = "changed: of the long tests those of what has changed, and a sample; all: everything, and what that adds"
    parser.addoption("--tests", choices=("changed", "all"), help=which)
    since = (
        "changed since this commit (default: where the branch has left origin/main; '' for not known: all is run whole)"
    )
    parser.addoption("--since", metavar="COMMIT", default=os.environ.get("GRALORA_EXT_TESTED"), help=since)
    day = "the day whose sample of the long tests is run (default: today)"
    parser.addoption("--sample", metavar="YYYY-MM-DD", default=date.today().isoformat(), help=day)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # all processes of pytest-xdist run what their controller has chosen
        config.whole, config.day = config.workerinput["whole"], config.workerinput["day"]
    else:
        config.whole = selection.whole_areas(config.getoption("--since")) if config.getoption("--tests") else {}
        config.day = config.getoption("--sample")
        try:
            date.fromisoformat(config.day)
        except ValueError as error:
            raise pytest.UsageError(f"--sample: {error}") from None
    device = config.getoption("--device")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no CUDA device here")
        from gralora_ext import build_info

        if not build_info()["cuda_archs"]:
            raise pytest.UsageError("--device cuda: this build of gralora_ext has no CUDA kernels (GRALORA_EXT_CUDA=1)")
    if device == "emulated":
        sys.path.append(str(Path(__file__).resolve().parent / "cuda_on_cpu"))
        import emulated_device

        emulated_device.install()
        config.pluginmanager.register(emulated_device)
        device = emulated_device.DEVICE
    os.environ["GRALORA_TEST_DEVICE"] = device  # for tuner_helpers


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not config.getoption("--tests"):
        return []
    whole, day = config.whole, config.day
    since = config.getoption("--since")
    again = shlex.join(["--sample", day, *(() if since is None else ("--since", since))])
    return [
        *(f"long tests, whole: {area} ({why})" for area, why in whole.items()),
        *(f"long tests, sample of {day}: {area}" for area in selection.AREAS if area not in whole),
        f"the same tests again: scripts/test.sh {again}",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Builds, and the CUDA kernels on the CPU, are long; other long tests say so themselves."""
    most = config.getoption("--most-cases")
    if most is not None:
        keep_cases(config, items, most)
    for item in items:
        if item.get_closest_marker("build") or "cuda_on_cpu" in item.path.parts:
            item.add_marker(pytest.mark.long)
    tests = config.getoption("--tests")
    if tests is None:
        return
    left_out = selection.left_out(items, config.whole, date.fromisoformat(config.day))
    config.left_out = {area: len(of) for area, of in left_out.items()}
    if tests == "changed":
        out = {item for of in left_out.values() for item in of}
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput |= {"whole": node.config.whole, "day": node.config.day}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a process of pytest-xdist has left out, its controller tells."""
    node.config.left_out = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = getattr(session.config, "left_out", {})


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    """At the very end, what was left out, and how to repeat alone what has failed."""
    yield
    tests = config.getoption("--tests")
    if tests:
        does = "left out" if tests == "changed" else "run, and left out without --all"
        counts = getattr(config, "left_out", {})
        terminalreporter.line(f"{does}: " + (", ".join(f"{n} of {area}" for area, n in counts.items()) or "nothing"))
    bad = [report for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, ())]
    for nodeid in list(dict.fromkeys(report.nodeid for report in bad))[:5]:
        terminalreporter.line(f"to repeat it alone: scripts/test.sh -n 0 {shlex.quote(nodeid)}", red=True)


def keep_cases(config: pytest.Config, items: list[pytest.Item], most: int) -> None:
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    few = {"max_examples": most, "phases": (Phase.explicit, Phase.generate)}  # and no smaller ones that fail too
    for item in items:
        if hasattr(getattr(item, "obj", None), "hypothesis"):  # it takes no settings beside those of a test's own
            own = item.obj._hypothesis_internal_use_settings
            item.obj._hypothesis_internal_use_settings = settings(own, **few)
    kept = {item for of in cases.values() for item in random.Random(0).sample(of, min(most, len(of)))}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes each gets whole files, and one of them all files that share :func:`builds`."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "builds" if Path(file).name.startswith("test_build_") else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all that the build tests make. They share it, so that builds for CUDA find the CPU's kernels compiled."""
    return tmp_path_factory.mktemp("builds")


@pytest.fixture(scope="session")
def sdist(builds: Path) -> Path:
    (builds / "sdist").mkdir()
    return build_helpers.make_sdist(builds / "sdist")


@pytest.fixture(scope="session")
def tree(sdist: Path, builds: Path) -> Path:
    """The sources as an sdist brings them."""
    return build_helpers.unpack(sdist, builds / "tree")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which the operations are tested."""
    return torch.device(os.environ["GRALORA_TEST_DEVICE"])


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of the command line draw no loss.png, which takes half of the time of a short one."""
    monkeypatch.setattr("gralora_ext.cli.report.draw", lambda metrics, path: path.write_bytes(b"plot"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A base in several files, and an adapter of it, which no test changes."""
    from checkpoint_helpers import gralora, llama, save_adapter, save_base

    folder = tmp_path_factory.mktemp("merge")
    base = save_base(folder / "base", llama(), torch.bfloat16, max_shard_size="20KB")
    return base, save_adapter(folder / "adapter", base, gralora())


@pytest.fixture
def own_sharded(tmp_path):
    """The same, to be changed, and a folder for the result."""
    from checkpoint_helpers import gralora, llama, save_adapter, save_base

    base = save_base(tmp_path / "base", llama(), torch.bfloat16, max_shard_size="20KB")
    return base, save_adapter(tmp_path / "adapter", base, gralora()), tmp_path / "out"
