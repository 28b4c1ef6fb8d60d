# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for running PEFT's own tests with PEFT's tuner or with ours; see ``scripts/peft_tests.sh``.

``pytest -p peft_plugin --gralora-tuner=fused --gralora-report=FILE`` writes the outcome of every test and, for each file of
tests, the number of times that a fused layer was called. ``python peft_plugin.py FUSED.json`` prints the tests that have not
passed, which are then run with PEFT's tuner. ``python peft_plugin.py FUSED.json STOCK.json`` exits with 1 where one of them
passes with PEFT's tuner, where too few have passed for that to mean something, or where our layer was hardly called.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple


class Least(NamedTuple):
    """What a file of tests must show: so many tests pass, and our layer is called so often with ours.

    Of the tests about four fifths of what PEFT 0.21 has, so that another release with some tests more or less is no failure,
    but a run without its models is; of the calls enough to show that the layers were ours.
    """

    passed: int
    calls: int


LEAST = {
    "test_custom_models.py": Least(365, 200),
    "test_initialization.py": Least(4, 0),
    "test_config.py": Least(20, 0),
    "test_decoder_models.py": Least(275, 1000),
    "test_encoder_decoder_models.py": Least(40, 100),
    "test_seq_classifier.py": Least(28, 10),
    "test_feature_extraction_models.py": Least(48, 100),
}


def file_of(nodeid: str) -> str:
    """The name of the file that holds a test."""
    return Path(nodeid.split("::")[0]).name


class Recorder:
    """Collects the outcome of each test and counts the calls of fused layers in each file."""

    def __init__(self, report: Path) -> None:
        self.report = report
        self.outcomes: dict[str, str] = {}
        self.calls: Counter[str] = Counter()
        self.file = ""

    def count_call(self, module: Any, inputs: Any) -> None:
        from gralora_ext.tuner import GraloraLinear

        if isinstance(module, GraloraLinear):
            self.calls[self.file] += 1

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.file = file_of(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A test has passed where its call has, unless its set-up or tear-down fails; a skip is
        # reported by the set-up.
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self.report.write_text(json.dumps({"calls": self.calls, "outcomes": self.outcomes}, indent=1))


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--gralora-tuner", choices=("stock", "fused"), default="stock")
    parser.addoption("--gralora-report", type=Path, required=True)


def pytest_configure(config: Any) -> None:
    # PEFT's tests make transformers' FutureWarnings errors. It gives these names up, which the PEFT
    # release uses.
    names = "(is_gradient_checkpointing|gradient_checkpointing_(enable|disable))"
    config.addinivalue_line("filterwarnings", f"ignore:.{names}. is deprecated:FutureWarning")
    recorder = Recorder(config.getoption("--gralora-report"))
    config.pluginmanager.register(recorder)
    if config.getoption("--gralora-tuner") == "fused":
        from torch.nn.modules.module import register_module_forward_pre_hook

        from gralora_ext.tuner import enable

        enable()
        register_module_forward_pre_hook(recorder.count_call)


def pytest_collection_finish() -> None:
    """Offline, PEFT's tests take what is in the cache: else they ask the hub the first time that they want a model."""
    utils = sys.modules.get("tests.testing_utils")
    if utils is not None and os.environ.get("HF_HUB_OFFLINE") == "1":
        from peft_models import MODELS

        utils._HUB_MODEL_ACCESSES.update(dict.fromkeys(MODELS, 1))


def not_passed(fused: dict[str, Any]) -> list[str]:
    return [test for test, outcome in fused["outcomes"].items() if outcome != "passed"]


def compare(fused: dict[str, Any], stock: dict[str, Any]) -> list[str]:
    """What is wrong with ``fused``, one line each; empty where all is well. ``stock``: its tests that did not pass."""
    worse = [
        f"{fused['outcomes'][test]} with our tuner, passed with PEFT's: {test}"
        for test in not_passed(fused)
        if stock["outcomes"].get(test) == "passed"
    ]
    passed = Counter(file_of(test) for test, outcome in fused["outcomes"].items() if outcome == "passed")
    for file, least in LEAST.items():
        if passed[file] < least.passed:
            worse.append(f"{file}: {passed[file]} tests pass, expected at least {least.passed}")
        calls = fused["calls"].get(file, 0)
        if calls < least.calls:
            worse.append(f"{file}: our layer was called {calls} times, expected at least {least.calls}")
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares PEFT's test results with our tuner and with its own.")
    parser.add_argument("fused", type=Path)
    parser.add_argument("stock", type=Path, nargs="?")
    arguments = parser.parse_args()
    fused = json.loads(arguments.fused.read_text())
    if arguments.stock is None:
        for test in not_passed(fused):
            print(test)
        return 0
    stock = json.loads(arguments.stock.read_text())
    for file in dict.fromkeys(map(file_of, fused["outcomes"])):
        outcomes = Counter(outcome for test, outcome in fused["outcomes"].items() if file_of(test) == file)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        print(f"  {file}: {counts}; fused layer called {fused['calls'].get(file, 0)} times")
    for test, outcome in stock["outcomes"].items():
        if outcome == "failed":
            print(f"fails without us, not counted: {test}")
    worse = compare(fused, stock)
    print("\n".join(worse) or "no test fails that passes without us")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
