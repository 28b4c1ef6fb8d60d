# SPDX-License-Identifier: Apache-2.0
"""A merge in files beside ``cp`` with ``sync``, and beside PEFT, in turns, on a model of 4 GB with the shapes of an 8B Llama."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time

import pytest
import torch

from gralora_ext.checkpoint.safetensors_file import SafetensorsWriter

WIDTH, KEYS, INNER, WORDS = 4096, 1024, 14336, 32000
LINEAR = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
MERGE = """
import sys, time
from pathlib import Path
from gralora_ext.checkpoint import merge
status = lambda name: next(int(l.split()[1]) << 10 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
Path("/proc/self/clear_refs").write_text("5")
before, start = status("VmRSS"), time.perf_counter()
merge(*sys.argv[1:4])
import os
os.sync()
print(time.perf_counter() - start, status("VmHWM") - before)
"""
PEFT = """
import os, sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
os.sync()
print(time.perf_counter() - start, 0)
"""


def make(folder, layers):
    """Random bfloat16 in two files, and an adapter for all linear layers."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    shapes = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for n in range(layers):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in LINEAR.items()}
        shapes |= {
            f"model.layers.{n}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}
    noise = (torch.randn(1 << 22) / 50).bfloat16().view(torch.uint8).numpy()
    names, files = list(shapes), {}
    for number, own in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        files |= dict.fromkeys(own, file)
        write(base / file, {name: shapes[name] for name in own}, "BF16", noise)
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": files})
    )
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "vocab_size": WORDS}
    config |= {"intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "tie_word_embeddings": False, "dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    parts = {}
    for name in names:
        if name.removesuffix(".weight").endswith("_proj"):
            M, N = shapes[name]
            layer = "base_model.model." + name.removesuffix(".weight")
            parts |= {f"{layer}.gralora_A": (2, N // 2, 32), f"{layer}.gralora_B": (2, 32, M // 2)}
    write(adapter / "adapter_model.safetensors", parts, "F32", (torch.randn(1 << 22) / 50).view(torch.uint8).numpy())
    fields = {"peft_type": "GRALORA", "task_type": "CAUSAL_LM", "r": 32, "alpha": 64, "gralora_k": 2, "hybrid_r": 0}
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": "all-linear"}))
    return base, adapter, size


def write(path, shapes, dtype, noise):
    writer = SafetensorsWriter(path, [(name, dtype, shape) for name, shape in shapes.items()], {"format": "pt"})
    for info in writer.tensors.values():
        for at in range(0, info.nbytes, noise.nbytes):
            writer.write(info.begin + at, noise[: info.nbytes - at])
    writer.finish()
    writer.close()


def run(program, *folders):
    done = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()[-2:]))


@pytest.mark.long
def test_half_as_fast_as_a_copy_and_five_times_as_fast_as_peft(tmp_path):
    if shutil.disk_usage(tmp_path).free < 20 << 30:
        pytest.skip("20 GB of disk are needed")
    base, adapter, size = make(tmp_path, layers=8)
    assert size > 4e9
    copy, out = tmp_path / "copy", tmp_path / "out"
    found = {"cp": [], "merge": [], "PEFT": []}
    for turn in range(3):
        os.sync()
        start = time.perf_counter()
        subprocess.run(["cp", "-r", "--reflink=never", base, copy], check=True)
        os.sync()
        found["cp"].append(time.perf_counter() - start)
        shutil.rmtree(copy)
        os.sync()
        seconds, grown = run(MERGE, base, adapter, out)
        found["merge"].append(seconds)
        assert grown < (64 << 20) + 4 * 32 * (WIDTH + INNER)
        shutil.rmtree(out)
        if turn == 0:
            os.sync()
            found["PEFT"].append(run(PEFT, base, adapter, out)[0])
            shutil.rmtree(out)
    print({name: [round(value, 2) for value in values] for name, values in found.items()})
    medians = {name: statistics.median(values) for name, values in found.items()}
    assert medians["cp"] / medians["merge"] > 0.5
    assert medians["PEFT"] / medians["merge"] > 5
