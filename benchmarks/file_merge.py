# SPDX-License-Identifier: Apache-2.0
"""A merge in files beside ``cp`` with ``sync``, and beside PEFT, on a model of 4 GB with the shapes of an 8B Llama.

``python -m benchmarks.file_merge FOLDER`` takes a quarter of an hour and 20 GB of disk in FOLDER. It prints seconds,
orders and ratios as JSON: what is committed as ``results/file-merge/measured.json``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gralora_ext.checkpoint.safetensors_file import SafetensorsWriter
from gralora_ext.program import machine

from .timing import ratio

REST_SECONDS = 30  # about what the slowest contender takes
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


def make(folder: Path, layers: int) -> tuple[Path, Path, int]:
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


def write(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, noise: Any) -> None:
    writer = SafetensorsWriter(path, [(name, dtype, shape) for name, shape in shapes.items()], {"format": "pt"})
    for info in writer.tensors.values():
        for at in range(0, info.nbytes, noise.nbytes):
            writer.write(info.begin + at, noise[: info.nbytes - at])
    writer.finish()
    writer.close()


def run(program: str, *folders: Path) -> tuple[float, ...]:
    done = subprocess.run([sys.executable, "-c", program, *folders], capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()[-2:]))


def copy(base: Path, out: Path) -> tuple[float, float]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", base, out], check=True)
    os.sync()
    return time.perf_counter() - start, 0.0


def settle(base: Path) -> None:
    """What every contender finds: nothing left to be written, the model in the page cache, and a disk that has rested.

    A host can let a guest write more at once after a pause, so that what follows a slow contender is quick.
    """
    os.sync()
    time.sleep(REST_SECONDS)
    for file in base.iterdir():
        with open(file, "rb") as opened:
            while opened.read(1 << 24):
                pass


def in_turns(
    contenders: dict[str, Callable[[], tuple[float, ...]]], base: Path, out: Path, turns: int
) -> dict[str, Any]:
    """Each contender once a turn, in an order drawn anew: seconds by contender, orders, and our growth in bytes."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order, most, draw = [], 0.0, random.Random(0)
    for _ in range(turns):
        order.append(draw.sample(list(contenders), len(contenders)))
        for name in order[-1]:
            settle(base)
            taken, grown = contenders[name]()
            seconds[name].append(taken)
            most = max(most, grown)
            shutil.rmtree(out)
    return {"seconds": seconds, "order": order, "growth": most}


def measure(folder: Path, turns: int = 7) -> dict[str, Any]:
    base, adapter, size = make(folder, layers=8)
    out = folder / "out"
    contenders = {
        "cp": partial(copy, base, out),
        "merge": partial(run, MERGE, base, adapter, out),
        "PEFT": partial(run, PEFT, base, adapter, out),
    }
    found = in_turns(contenders, base, out, turns)
    seconds = found["seconds"]
    return {
        "bytes": size,
        **found,
        "beside_copy": ratio(seconds["cp"], seconds["merge"]),
        "beside_peft": ratio(seconds["PEFT"], seconds["merge"]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": machine.commit(Path(__file__).resolve().parent.parent),
        "machine": machine.machine(None),
        "versions": machine.versions(),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as made:
        print(json.dumps(measure(Path(made)), indent=2))
