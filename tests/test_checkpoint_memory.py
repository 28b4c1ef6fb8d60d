# SPDX-License-Identifier: Apache-2.0
"""A merge takes at most 64 MiB and one layer's adapter beyond the process after its imports, whatever the model."""

import json
import subprocess
import sys

import pytest
import torch
from checkpoint_helpers import gralora, llama, save_adapter, save_base

from gralora_ext.checkpoint.safetensors_file import SafetensorsWriter

BOUND = 64 << 20
PROGRAM = """
import resource, sys
from pathlib import Path
from gralora_ext.checkpoint import merge

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
before = status("VmRSS")
if sys.argv[4] == "limited":
    limit = status("VmSize") + (1 << 30) + int(sys.argv[5])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
merge(*sys.argv[1:4], **({"dtype": sys.argv[6]} if sys.argv[6] else {}))
print(status("VmHWM") - before)
"""


def make(folder, dtype, columns, rows, layers, r):
    """A model of zeros in a file with holes, and an adapter for its widest layer."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "none", "architectures": ["None"]}))
    tensors = [(f"layers.{n}.up.weight", dtype, (rows, columns)) for n in range(layers)]
    writer = SafetensorsWriter(base / "model.safetensors", tensors, {"format": "pt"})
    writer.finish()
    writer.close()
    fields = {"peft_type": "GRALORA", "r": r, "alpha": 8, "gralora_k": 2, "hybrid_r": 0}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    parts = [
        (f"base_model.model.layers.{n}.up.gralora_{part}", "F32", shape)
        for n in range(layers)
        for part, shape in (("A", (2, columns // 2, r)), ("B", (2, r, rows // 2)))
    ]
    writer = SafetensorsWriter(adapter / "adapter_model.safetensors", parts, {"format": "pt"})
    for info in writer.tensors.values():
        values = torch.full((info.numel,), 0.01)
        writer.write(info.begin, values.view(torch.uint8).numpy())
    writer.finish()
    writer.close()
    return base, adapter, 4 * r * (columns + rows)


@pytest.mark.parametrize(
    "dtype, wanted, columns, rows, layers, r, limit",
    [
        ("BF16", "", 4096, 10240, 2, 64, ""),
        ("F32", "bf16", 4096, 5120, 2, 8, ""),
        ("BF16", "fp32", 4096, 9216, 2, 8, ""),
        ("F32", "", 2 << 20, 10, 2, 2, ""),  # a row is larger than a buffer
        pytest.param("BF16", "", 8192, 28672, 3, 64, "limited", marks=pytest.mark.long),
    ],
)
def test_memory_stays_within_the_bound(tmp_path, dtype, wanted, columns, rows, layers, r, limit):
    base, adapter, one_layer = make(tmp_path, dtype, columns, rows, layers, r)
    assert (base / "model.safetensors").stat().st_size > 2 * BOUND
    arguments = [base, adapter, tmp_path / "out", limit, str(one_layer), wanted]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) <= BOUND + one_layer


def test_a_long_header_takes_at_most_ten_times_what_it_has_beyond_3_mebibytes(tmp_path):
    mebibytes = 6
    base = save_base(tmp_path / "base", llama(num_hidden_layers=1))
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    entry = b'"%d":{"dtype":"I8","shape":[],"data_offsets":[%d,%d]},'
    text = bytearray(b"{")
    count = 0
    while len(text) < (mebibytes << 20) - 100:
        text += entry % (count, count, count + 1)
        count += 1
    text[-1:] = b"}"
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(count))
    program = PROGRAM.replace("merge(*", "try:\n    merge(*").replace("\nprint", "\nexcept ValueError: pass\nprint")
    arguments = [base, adapter, tmp_path / "out", "free", "0", ""]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= BOUND + 10 * (mebibytes - 3 << 20)


def test_an_index_as_long_as_it_may_be_stays_within_the_bound(tmp_path):
    base = save_base(tmp_path / "base", llama(num_hidden_layers=1), max_shard_size="20KB")
    adapter = save_adapter(tmp_path / "adapter", base, gralora())
    entries = ",".join(f'"{n}":""' for n in range(1_050_000))
    (base / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{entries}}}}}')
    assert (base / "model.safetensors.index.json").stat().st_size < 12 << 20
    program = PROGRAM.replace("merge(*", "try:\n    merge(*").replace("\nprint", "\nexcept ValueError: pass\nprint")
    arguments = [base, adapter, tmp_path / "out", "free", "0", ""]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= BOUND
