# SPDX-License-Identifier: Apache-2.0
"""Files that were changed at random: a clear error or a model that loads, in bounded memory and time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import gralora, llama, save_adapter, save_base

PROGRAM = Path(__file__).with_name("mutated_files.py")


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_mutated_files_are_refused_or_load(tmp_path, count):
    base = save_base(tmp_path / "base", llama(num_hidden_layers=1), torch.bfloat16, max_shard_size="20KB")
    adapter = save_adapter(tmp_path / "adapter", base, gralora(target_modules=["q_proj", "up_proj"], hybrid_r=2))
    (tmp_path / "work").mkdir()
    command = [sys.executable, PROGRAM, base, adapter, tmp_path / "work", str(count), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"] + found["loaded"] == count and found["refused"] > count / 3 and found["loaded"] > 0
    assert found["grown"] < 64 << 20 and found["slowest"] < 10
