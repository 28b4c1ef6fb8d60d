# SPDX-License-Identifier: Apache-2.0
"""The options: the command line over a configuration file over the defaults, each checked before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gralora_ext.cli.options import build_parser, parse, settings
from gralora_ext.program.errors import JobError


def config(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_help_names_every_option_with_its_default():
    text = build_parser().format_help()
    for name in ("model", "data", "prompt-field", "answer-field", "output", "r", "k", "alpha", "hybrid-r", "dropout"):
        assert f"--{name} " in text
    for name in ("target-modules", "steps", "epochs", "batch-size", "grad-accum", "lr", "max-length", "seed", "dtype"):
        assert f"--{name} " in text
    for name in ("eval-every", "save-every", "resume", "merge", "backend", "config"):
        assert f"--{name}" in text
    for default in ("(default: 16)", "(default: fused)", "(default: all-linear)", "(default: question)"):
        assert default in " ".join(text.split())


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_file_gives_options_and_the_command_line_overrides_them(tmp_path, name):
    values = {"r": 8, "k": 4, "lr": 5e-4, "merge": False, "target_modules": ["q_proj", "v_proj"], "grad-accum": 3}
    values["data"] = None
    file = config(tmp_path, name, json.dumps(values))  # JSON is YAML too
    options = parse(["--config", file, "--k", "2", "--target-modules", "o_proj"])
    assert (options.r, options.k, options.lr, options.merge, options.grad_accum) == (8, 2, 5e-4, False, 3)
    assert options.target_modules == ["o_proj"]
    assert parse(["--config", file]).target_modules == ["q_proj", "v_proj"]
    assert parse(["--config", file, "--merge"]).merge is True
    assert options.data is None


def test_yaml_numbers_without_a_point_are_numbers(tmp_path):
    assert parse(["--config", config(tmp_path, "c.yaml", "lr: 1e-3\n")]).lr == 1e-3


def test_length_of_the_job_on_the_command_line_replaces_the_files(tmp_path):
    steps, epochs = config(tmp_path, "s.yaml", "steps: 9\n"), config(tmp_path, "e.yaml", "epochs: 2\n")
    assert (parse(["--config", steps]).steps, parse(["--config", epochs]).epochs) == (9, 2)
    assert vars(parse(["--config", steps, "--epochs", "1.5"]))["steps"] is None
    assert vars(parse(["--config", epochs, "--steps", "4"]))["epochs"] is None


def test_defaults_depend_on_what_is_given():
    assert parse(["--r", "8", "--hybrid-r", "4"]).alpha == 24
    assert parse([]).output == "runs/smollm2-gsm8k"
    assert parse(["--model", "org/Some-0.5B", "--data", "in/rows.jsonl"]).output == "runs/Some-0.5B-rows"
    assert parse(["--dtype", "bfloat16"]).dtype == "bf16"


def test_settings_are_a_configuration_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    given = [
        "--model",
        "model",
        "--r",
        "6",
        "--epochs",
        "2",
        "--no-merge",
        "--target-modules",
        "q_proj",
        "--output",
        "out",
    ]
    values = settings(parse(given))
    assert values["model"] == str(tmp_path / "model") and values["output"] == str(tmp_path / "out")
    file = config(tmp_path, "finetune.json", json.dumps(values))
    assert settings(parse(["--config", file])) == values


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("r: 8\nranks: 4\n", 2, "unknown option 'ranks'"),
        ("r: 8\n\nlr: fast\n", 3, "expected a positive number, got 'fast'"),
        ("# rank\nr: 0\n", 2, "at least 1, got '0'"),
        ("backend: cuda\n", 1, "invalid choice: 'cuda'"),
        ("r: true\n", 1, "--r"),
        ("merge: 3\n", 1, "merge"),
        ("hybrid_r:\n  a: 1\n", 1, "single value"),
        ("r: [8\n", 2, "not YAML"),
        ("r: 8\nlearning_rate: 1\n", 2, "unknown option 'learning_rate' (did you mean --lr?)"),
        ("target_modules: [[q_proj]]\n", 1, "single value"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, text, line, says):
    file = config(tmp_path, "c.yaml", text)
    with pytest.raises(JobError) as error:
        parse(["--config", file])
    assert f"{file}:{line}: " in str(error.value) and says in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("c.json", '{"r": 8,\n "k" 2}', "c.json:2: not JSON"),
        ("c.json", "[1]", "expected names and values, got list"),
        ("c.toml", "r = 8", "must end in .yaml, .yml or .json"),
        ("c.yaml", "just a text", "expected names and values, got str"),
        ("c.json", '{"r": %s}' % ("9" * 5000), "a value that cannot be read: Exceeds the limit"),
        ("c.yaml", f"r: {'9' * 5000}", "a value that cannot be read: Exceeds the limit"),
        ("c.json", "[" * 100_000, "nested too deeply"),
        ("c.yaml", "[" * 5000, "nested too deeply"),
        ("c.yaml", "r: 2024-13-45", "a value that cannot be read: month must be in 1..12"),
        ("c.json", r'{"output": "a\u0000b"}', "--output: 'a\\x00b' cannot be a path: embedded null byte"),
        ("c.json", r'{"data": "\ud800"}', "--data: "),
    ],
)
def test_file_that_is_no_configuration_is_refused(tmp_path, name, text, says):
    with pytest.raises(JobError) as error:
        parse(["--config", config(tmp_path, name, text)])
    assert says in str(error.value) and len(str(error.value)) < 300
    assert f"c.{name[2:]}" in str(error.value) or "--output" in text or says.startswith("--")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "none.yaml"], "none.yaml cannot be read"),
        (["--r", "x"], "argument --r: expected a whole number of at least 1, got 'x'"),
        (["--r", "6", "--k", "4"], "--k 4 does not divide --r 6"),
        (["--dropout", "1"], "argument --dropout: expected a number of at least 0 and below 1, got '1'"),
        (["--lr", "nan"], "argument --lr: expected a positive number"),
        (["--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
        (["--steps", "2", "--epochs", "1"], "--steps and --epochs exclude each other"),
        (["--rank", "4"], "unrecognized arguments: --rank 4 (did you mean --r?)"),
        (["--ste", "4"], "unrecognized arguments: --ste 4 (did you mean --steps?)"),
        (["--lrr", "4"], "unrecognized arguments: --lrr 4 (did you mean --lr?)"),
        (["--learning_rate=4"], "(did you mean --lr?)"),
        (["--grad_accum", "4"], "(did you mean --grad-accum?)"),
        (["--no-merg"], "(did you mean --no-merge?)"),
        (["--xyzzy"], "unrecognized arguments: --xyzzy"),
        (["--data=--"], "argument --data: expected a value, got '--'"),
        (["--k=--"], "argument --k: expected a value, got '--'"),
        (["--r", "9" * 5000], "argument --r: expected a whole number of at most 2147483647, got '999"),
        (["--seed", str(2**32)], "argument --seed: expected a whole number of at most 4294967295"),
        (["--dtype", "x" * 5000], "argument --dtype: invalid choice: 'xxx"),
        (["--" + "x" * 5000], "unrecognized arguments: --xxx"),
        (["--output", "x" * 300], "--output: xxx"),
        (["--output", "x/" * 2030], "cannot be a path: File name too long"),
        (["--model", "x" * 250, "--data", "y" * 250], "cannot be a path: File name too long"),
        (["--model", "~nobody-of-this-name/x"], "cannot be a path: Could not determine home directory"),
        (["--data", ""], "--data: expected a path, got an empty text"),
        (["--target-modules", "(q_proj"], "--target-modules: '(q_proj' is not a regular expression"),
        (["--target-modules", "(" * 50_000], "is not a regular expression: nested too deeply"),
    ],
)
def test_bad_argument_is_named(arguments, says):
    with pytest.raises(JobError) as error:
        parse(arguments)
    assert says in str(error.value) and len(str(error.value)) < 300


def test_bad_argument_of_info_is_named_too():
    from gralora_ext.cli.info import run

    with pytest.raises(JobError, match=r"unrecognized arguments: --self \(did you mean --selftest\?\)"):
        run(["--self"])
