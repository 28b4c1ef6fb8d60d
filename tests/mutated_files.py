# SPDX-License-Identifier: Apache-2.0
"""Merges of files that were changed at random: ``python mutated_files.py BASE ADAPTER FOLDER COUNT SEED``.

Each ends in one of the package's own errors, or in a model that loads. Prints how often either came, and by how many bytes the process
has grown over what it had after one merge of the files as they were.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils  # noqa: F401  else each question about names starts a process
from safetensors.torch import load_file

from gralora_ext.checkpoint import merge
from gralora_ext.program.errors import JobError

VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    2**70,
    10**400,
    0.5,
    -1e308,
    "",
    "a",
    "\x00",
    "\ud800",
]
VALUES += [
    "x" * 5000,
    "../model.safetensors",
    "/etc/passwd",
    [],
    {},
    [[]],
    [0, 0],
    [-1, 5],
    {"a": {}},
    "F32",
    "F64",
    "I8",
    "F4",
]


def mutated(data: bytes, rng: random.Random, is_json: bool) -> bytes:
    """``data`` with some of it changed, as bytes or as what its JSON says."""
    how = rng.choice(["flip", "cut", "insert", "json", "json", "json", "zeros", "swap"])
    begin, end = (0, len(data)) if is_json else (0, 8 + int.from_bytes(data[:8], "little"))
    if how == "json":
        text = data if is_json else data[8:end]
        value = json.loads(text)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            value = changed(value, rng)
        new = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
        return new if is_json else len(new).to_bytes(8, "little") + new + data[end:]
    at = rng.randrange(begin, end) if rng.random() < 0.9 else rng.randrange(len(data))
    size = rng.choice([1, 1, 2, 8, 100])
    if how == "flip":
        return data[:at] + bytes(b ^ (1 << rng.randrange(8)) for b in data[at : at + size]) + data[at + size :]
    if how == "cut":
        return data[:at] if rng.random() < 0.5 else data[:at] + data[at + size :]
    if how == "insert":
        what = rng.choice([rng.randbytes(size), b"[" * 10000, b'{"a":' * 10000, b"9" * 5000, data[at : at + size]])
        return data[:at] + what + data[at:]
    if how == "zeros":
        return data[:at] + bytes(size) + data[at + size :]
    other = rng.randrange(len(data))
    return data[:at] + data[other : other + size] + data[at + size :]


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part of it replaced, taken away, doubled or renamed."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
    key = rng.choice(list(value))
    how = rng.random()
    if how < 0.1:
        return {k: v for k, v in value.items() if k != key}
    if how < 0.2:
        return {**value, rng.choice(["", "a", "x" * 3000, "\u0000", "__metadata__"]): value[key]}
    if how < 0.3:
        return {(k + ".a" if k == key else k): v for k, v in value.items()}
    return {**value, key: changed(value[key], rng)}


def high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    base, adapter, folder = map(Path, sys.argv[1:4])
    count, seed = map(int, sys.argv[4:])
    os.fsync = lambda handle: None  # type: ignore[assignment]  # the disk is not what is tested
    merge(base, adapter, folder / "plain")
    before = high_water()
    refused = loaded = 0
    slowest = 0.0
    for number in range(seed, seed + count):
        rng = random.Random(number)
        one, two, out = folder / "base", folder / "adapter", folder / "out"
        for path in (one, two, out):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(base, one)
        shutil.copytree(adapter, two)
        files = [p for p in (*one.iterdir(), *two.iterdir()) if p.suffix in (".json", ".safetensors")]
        files = [p for p in sorted(files) if p.name not in ("tokenizer.json", "generation_config.json")]
        victim = rng.choice(files)
        victim.write_bytes(mutated(victim.read_bytes(), rng, victim.suffix == ".json"))
        start = time.perf_counter()
        try:
            merge(one, two, out, **rng.choice([{}, {"dtype": "fp32"}, {"max_shard_size": "9KB"}]))
            for file in out.glob("*.safetensors"):
                assert all(isinstance(tensor, torch.Tensor) for tensor in load_file(file).values())
            loaded += 1
        except JobError as error:
            assert len(str(error)) < 2000 and "\n" not in str(error), str(error)[:500]
            assert not (out / "config.json").exists()
            refused += 1
        except BaseException:  # noqa: BLE001  anything else is what is looked for
            print(traceback.format_exc()[-3000:], file=sys.stderr)
            raise SystemExit(f"mutation {number} of {victim.name}") from None
        slowest = max(slowest, time.perf_counter() - start)
    print(json.dumps({"refused": refused, "loaded": loaded, "grown": high_water() - before, "slowest": slowest}))


main()
