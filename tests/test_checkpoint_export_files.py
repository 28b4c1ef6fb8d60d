# SPDX-License-Identifier: Apache-2.0
"""Exports are whole or not there, nobody's files are replaced, and what is wrong is said in one sentence."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import gralora, llama, lora, save_adapter, save_base
from cli_helpers import call, sentence
from export_helpers import CONFIG, WEIGHTS, assert_same_outputs
from official_helpers import make
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gralora_ext.checkpoint import import_official
from gralora_ext.checkpoint.export import export_lora
from gralora_ext.program.errors import FileError
from gralora_ext.program.signals import stopper


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), llama())


def test_a_large_layer_is_exported_in_less_than_a_second(tmp_path: Path) -> None:
    """4096 x 14336, r = 128, k = 4; the decomposition of such a ΔW takes tens of seconds."""
    name = "base_model.model.model.layers.0.mlp.up_proj"
    config = {"peft_type": "GRALORA", "r": 128, "gralora_k": 4, "alpha": 256, "target_modules": ["up_proj"]}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    tensors = {f"{name}.gralora_A": torch.rand(4, 1024, 128), f"{name}.gralora_B": torch.rand(4, 128, 3584)}
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    seconds = []
    for i in range(5):  # the fastest, since other programs may be running
        start = time.perf_counter()
        export_lora(tmp_path / "a", tmp_path / f"{i}")
        seconds.append(time.perf_counter() - start)
        shutil.rmtree(tmp_path / f"{i}")
    assert min(seconds) < 1


def test_the_same_adapter_gives_the_same_files(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, gralora())
    for name in ("one", "two"):
        export_lora(tmp_path / "a", tmp_path / name)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with safe_open(tmp_path / "one" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_folder_with_files_in_it_is_refused_and_an_empty_one_is_used(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, gralora())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for place, what in (
        ("mine", r"mine holds other files \(notes.txt\): expected a new or empty folder"),
        ("a", "a holds other files .*: expected a new or empty folder"),
        ("mine/notes.txt", "notes.txt is not a folder: expected a new or empty one"),
    ):
        with pytest.raises(FileError, match=what):
            export_lora(tmp_path / "a", tmp_path / place)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export_lora(tmp_path / "a", tmp_path / "empty")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == [CONFIG, WEIGHTS]


def test_an_error_in_the_middle_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(tmp_path / "a", base, gralora())
    before = sorted(tmp_path.iterdir())
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("gralora_ext.checkpoint.export.ExportedLayer", fail)
    with pytest.raises(KeyboardInterrupt):
        export_lora(tmp_path / "a", tmp_path / "lora")
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_gralora_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "lora", base, lora())
    with pytest.raises(FileError, match="peft_type is LORA: expected a GRALORA adapter"):
        export_lora(tmp_path / "lora", tmp_path / "out")
    save_adapter(tmp_path / "a", base, gralora(modules_to_save=["lm_head"]))
    whole = load_file(tmp_path / "a" / WEIGHTS)
    save_file({n: t for n, t in whole.items() if "gralora" not in n}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(FileError, match="holds no layer with a GraLoRA adapter"):
        export_lora(tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "some"}, "bias: expected one of none, all, gralora_only, got 'some'"),
        ({"bias": ["all"]}, "bias: expected one of"),
        ({"layers_to_transform": [0], "target_modules": "a|b"}, "has what LoRA's configuration refuses: "),
    ],
)
def test_a_configuration_that_lora_cannot_have_is_refused(
    base: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    save_adapter(tmp_path / "a", base, gralora())
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, **fields}))
    with pytest.raises(FileError, match=message):
        export_lora(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


HOSTILE = [
    None,
    True,
    0,
    1,
    -1,
    3,
    8,
    10**30,
    1e308,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "(",
    "a" * 5000,
    "all",
    "auto",
    [],
    [1],
    ["q_proj"],
    [None],
    {},
    {"a": 1},
    {"q_proj": 4},
    {"a": {"b": []}},
    "\ud800",
]
FIELDS_OF_FILES = [
    "alpha",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "gralora_alpha",
    "gralora_dropout",
    "gralora_k",
    "hybrid_r",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "exclude_modules",
    "alpha_pattern",
    "use_rslora",
    "trainable_token_indices",
    "ensure_weight_tying",
    "runtime_config",
    "use_dora",
    "unknown",
]


@pytest.mark.parametrize("kind", ["export", "import"])
def test_a_hostile_configuration_is_refused_in_one_sentence_or_taken(base: Path, tmp_path: Path, kind: str) -> None:
    if kind == "export":
        save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj", "up_proj"], hybrid_r=2))
    else:
        make(tmp_path / "a", base, r=10, hybrid_r=2)
    config, refused = json.loads((tmp_path / "a" / CONFIG).read_text()), 0
    cases = list(itertools.product(FIELDS_OF_FILES, HOSTILE))
    for name, value in random.Random(0).sample(cases, 250):
        (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, name: value}))
        try:
            (export_lora if kind == "export" else import_official)(tmp_path / "a", tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        except FileError as error:
            refused += 1
            assert len(str(error)) < 600 and "\n" not in str(error)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert 50 < refused < 240


def test_what_is_not_finite_is_named_where_it_would_be_decomposed(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj"]))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    next(t for n, t in tensors.items() if "layers.1" in n)[0, 0, 0] = float("inf")
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(FileError, match="layer model.layers.1.self_attn.q_proj: the adapter holds NaN or infinity"):
        export_lora(tmp_path / "a", tmp_path / "out", rank=3)


# ---------------------------------------------------------------- the command


def test_the_command_says_what_it_wrote(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj", "up_proj"]))
    result = call("export-lora", "a", "lora", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "lora: a LoRA of 4 layers, rank 16, exact\n"), result.stderr
    assert_same_outputs(base, tmp_path / "a", tmp_path / "lora")
    result = call("export-lora", "a", "small", "--rank", 5, cwd=tmp_path)
    first, *lines = result.stdout.splitlines()
    assert first == "small: a LoRA of 4 layers, rank 5, 4 of them truncated" and len(lines) == 4
    report = export_lora(tmp_path / "a", tmp_path / "again", rank=5)
    for line, layer in zip(lines, report.layers, strict=True):
        assert line.split() == f"{layer.name} rank 5 of 16 relative error {layer.error:.2e}".split()
    result = call("export-lora", "a", "served", "--for", "vllm", cwd=tmp_path)
    assert result.stdout == "served: a LoRA of 4 layers, rank 16, exact\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "out"), "nothing is not a folder: expected an adapter's"),
        (("a", "a"), "a holds other files ("),
        (("a", "out", "--rank", "0"), "--rank: expected a positive integer, got 0"),
        (("a", "out", "--rank", "many"), "argument --rank: invalid int value: 'many'"),
        (("a", "out", "--rank", "9", "--for", "vllm"), "--rank: expected one that vllm serves (8, 16, "),
        (("a", "out", "--for", "tgi"), "--for: expected one of vllm, got 'tgi'"),
        (("a",), "the following arguments are required: OUT"),
        (("a", "out", "--ranks", "8"), "unrecognized arguments: --ranks 8 (did you mean --rank?)"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    base: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj"]))
    result = call("export-lora", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and sentence(result).startswith(f"gralora-ext: error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    save_adapter(tmp_path / "a", base, gralora())
    monkeypatch.setattr(stopper, "signum", None)  # and again at the end
    monkeypatch.setattr("gralora_ext.checkpoint.export.ExportedLayer", lambda *_: os.kill(os.getpid(), signum))
    result = call("export-lora", "a", "out", cwd=tmp_path)
    assert result.returncode == 128 + signum
    assert sentence(result).endswith("if adapter_config.json is in OUT, all is there; else run the same command again")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
