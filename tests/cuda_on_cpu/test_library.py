# SPDX-License-Identifier: Apache-2.0
"""The whole library on the CUDA kernels: the tests of operations and layers on a device that is emulated."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import compilers
import emulated_device
import pytest
import torch

from gralora_ext import _build_config as config

pytestmark = pytest.mark.skipif(
    compilers.find_toolkit() is None or compilers.compiler() is None or config.cuda.hides_streams(torch.__version__),
    reason="needs CUDA's headers, g++, and torch 2.11 or newer",
)
TESTS = Path(__file__).resolve().parent.parent
OPERATIONS = ("backward", "compile", "dropout", "few_tokens", "forward", "identities", "inplace", "kept", "merge")
OPERATIONS += ("pairs", "pieces")
FILES = [*(f"test_ops_{name}.py" for name in OPERATIONS), "test_model_gradients.py", "test_cuda.py"]
# Those of layers' passes; the others are about files, configurations and weights alone.
LAYERS = ("adapters", "checkpoints", "engines", "forward", "frozen", "merge", "mixed_batch", "plugin", "training")
FILES += [f"test_tuner_{name}.py" for name in LAYERS]
# The others there are about the CPU's threads.
FILES += ["test_ops_determinism.py::test_results_do_not_depend_on_what_new_memory_holds"]
LAUNCHED = ("project", "expand", "weight_gradient", "reduce", "merge", "products")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, *command],
        check=False,
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.parametrize(
    ("most_cases", "least_passed"), [(2, 250), pytest.param(6, 500, marks=pytest.mark.exhaustive)], ids=["few", "many"]
)
def test_operations_and_layers_pass_their_tests_on_an_emulated_device(most_cases: int, least_passed: int) -> None:
    """So many cases of each test: the emulator is slow."""
    options = ("-q", "-p", "no:cacheprovider", "--device=emulated", f"--most-cases={most_cases}")
    done = run("-m", "pytest", *options, *(f"tests/{name}" for name in FILES))
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    counts = dict(re.findall(r"(\w+) (\d+)", re.search("launched on the emulator: (.*)", done.stdout)[1]))
    assert all(int(counts[name]) > 100 for name in LAUNCHED), counts
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > least_passed, done.stdout[-1000:]


def test_what_is_left_out_exists() -> None:
    sources = "".join((TESTS / name.partition("::")[0]).read_text() for name in FILES)
    assert [name for name in emulated_device.LEFT_OUT if f"def {name.partition('[')[0]}" not in sources] == []


def test_the_host_cannot_touch_a_devices_memory() -> None:
    """So that the tests above show that nothing reads a seed, or anything else, on the host."""
    code = "import ctypes, torch, emulated_device as e; e.install(); x = torch.ones(3, device=e.DEVICE); print(x.tolist());"
    assert run("-c", "import sys; sys.path.append('tests/cuda_on_cpu');" + code).stdout == "[1.0, 1.0, 1.0]\n"
    code += "ctypes.string_at(x.data_ptr(), 4)"
    assert run("-c", "import sys; sys.path.append('tests/cuda_on_cpu');" + code).returncode == -signal.SIGSEGV
