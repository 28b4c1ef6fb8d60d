# SPDX-License-Identifier: Apache-2.0
"""The options: the command line over a configuration file over the defaults, each checked before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gralora_ext.cli.checks import is_slow_in_bf16
from gralora_ext.cli.option_table import NOT_HERE, OPTIONS
from gralora_ext.cli.options import decisive, parse, settings
from gralora_ext.cli.parser import HOW, OTHER_NAMES, JobParser
from gralora_ext.program.errors import JobError


def config(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_help_names_every_option_with_its_default():
    text = JobParser().format_help()
    for option in OPTIONS.values():
        assert f"--{option.name} " in text or f"--{option.name}," in text
    for name in HOW:
        assert f"--{name.replace('_', '-')}" in text
    for default in ("(default: 16)", "(default: fused)", "(default: all-linear)", "(default: question)"):
        assert default in " ".join(text.split())


def test_no_name_stands_for_two_options():
    names = [o.name for o in OPTIONS.values()] + [n for o in OPTIONS.values() for n in o.also.split()]
    assert len(names) == len(set(names))
    assert not {*names, *(f"no-{n}" for n in names)} & NOT_HERE.keys()
    assert all(name == name.lower() and "_" not in name for name in names)


# What a user of Trainer, TRL, axolotl or LLaMA-Factory types, and what it is here.
TYPED = {
    "--model_name_or_path m --dataset_name d --output_dir o": {"model": "m", "data": ["d"], "output": "o"},
    "--base-model m --dataset-path a b": {"model": "m", "data": ["a", "b"]},
    "--max_steps 7 --learning_rate 2e-4": {"steps": 7, "lr": 2e-4},
    "--num_train_epochs 2": {"epochs": 2.0, "steps": None},
    "--per_device_train_batch_size 3 --gradient_accumulation_steps 5": {"batch_size": 3, "grad_accum": 5},
    "--micro_batch_size=3": {"batch_size": 3},
    "--lora_r 8 --lora_alpha 16 --lora_dropout 0.1 --lora_target_modules q_proj v_proj": {
        "r": 8,
        "alpha": 16,
        "dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
    },
    "--rank 8 --gralora_k 4": {"r": 8, "k": 4},
    "--gralora-k auto": {"k": "auto"},
    "--bf16 True --gradient_checkpointing --packing=true": {
        "bf16": True,
        "gradient_checkpointing": True,
        "packing": True,
    },
    "--bf16 false --no_merge --no-packing": {"bf16": False, "merge": False, "packing": False},
    "--lr_scheduler_type constant_with_warmup --warmup_ratio 0.1": {"lr_schedule": "constant", "warmup_ratio": 0.1},
    "--optim adamw_bnb_8bit --weight_decay 0.01 --max_grad_norm 0": {"optim": "adamw_8bit", "max_grad_norm": 0.0},
    "--torch_dtype bfloat16 --attn_implementation eager": {"dtype": "bf16", "attn_implementation": "eager"},
    "--max_seq_length 512 --neftune_noise_alpha 5": {"max_length": 512, "neftune_noise_alpha": 5.0},
    "--backend lora --use_dora --init_lora_weights pissa": {"use_dora": True, "init_weights": "pissa"},
    "--init_lora_weights false": {"init_weights": False},
    "--assistant_only_loss --dataset_text_field t": {"answers_only": True, "text_field": "t"},
    "--dataset_name d --eval-dataset d --dataset_test_split test": {"eval_data": ["d"], "eval_split": "test"},
    "--no-completion-only-loss": {"answers_only": False},
    "--rank_pattern q_proj=8 .*v_proj=4": {"rank_pattern": {"q_proj": 8, ".*v_proj": 4}},
    '--alpha_pattern {"q_proj":2.5}': {"alpha_pattern": {"q_proj": 2.5}},
    "--trainable_token_indices 1 2": {"trainable_token_indices": [1, 2]},
    '--trainable_token_indices {"embed_tokens":[3]}': {"trainable_token_indices": {"embed_tokens": [3]}},
    "--save_steps 3 --eval_steps 4 --resume_from_checkpoint true": {"save_every": 3, "eval_every": 4, "resume": True},
    "--report_to none": {"report_to": None},
    "--report_to wandb tensorboard --run_name x": {"report_to": ["wandb", "tensorboard"], "run_name": "x"},
}


@pytest.mark.parametrize("line", TYPED)
def test_words_of_other_programs_are_understood_on_the_command_line_and_in_files(line, tmp_path):
    words = line.split()
    found = vars(parse(words))
    assert TYPED[line].items() <= found.items()
    # The same as a file: a word after its option is its value, several are a list.
    content: dict[str, object] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            negative = name.startswith("no") and name[2] in "-_"
            content[last := name[3:] if negative else name] = value or not negative
        else:
            content[last] = word if content[last] is True else [*_list(content[last]), word]
    content = {name: json.loads(v) if str(v).startswith("{") else v for name, v in content.items()}
    if "resume_from_checkpoint" in content:
        del content["resume_from_checkpoint"]
    elsewhere = vars(parse(["--config", config(tmp_path, "c.yaml", json.dumps(content))]))
    assert {k: v for k, v in found.items() if k not in HOW} == {k: v for k, v in elsewhere.items() if k not in HOW}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def test_every_other_name_leads_to_its_option():
    for other, name in OTHER_NAMES.items():
        with pytest.raises(JobError) as error:
            parse([f"--{other}", ""])
        assert f"--{other} (here --{name}):" in str(error.value), other


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_printed_configuration_can_be_fed_back(name, tmp_path, capsys, monkeypatch):
    from gralora_ext.cli import main

    monkeypatch.chdir(tmp_path)
    words = ["--lora_r", "8", "--rank-pattern", "q_proj=4", "--packing", "--init-weights", "false", "--data", "a", "b"]
    assert main(["finetune", *words, "--print-config"]) == 0
    printed = capsys.readouterr().out
    values = json.loads(printed)
    assert values["r"] == 8 and values["rank_pattern"] == {"q_proj": 4} and values["data"] == ["a", "b"]
    assert main(["finetune", "--config", config(tmp_path, name, printed), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


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


@pytest.mark.parametrize("printed", [False, True], ids=["finetune.json", "--print-config"])
def test_settings_with_rows_to_hold_out_are_a_configuration_file(printed, tmp_path, capsys, monkeypatch):
    from gralora_ext.cli import main

    monkeypatch.chdir(tmp_path)
    words = ["--data", "a.jsonl", "--eval-data", "b.jsonl", "--output", "out"]
    values = settings(parse(words))
    text = json.dumps(values)
    if printed:
        assert main(["finetune", *words, "--print-config"]) == 0
        text = capsys.readouterr().out
    again = parse(["--config", config(tmp_path, "finetune.json", text)])
    assert settings(again) == values and decisive(settings(again)) == decisive(values)


@pytest.mark.parametrize("data", [[], ["--data", "a.jsonl"]], ids=["embedded", "own"])
def test_older_settings_with_rows_to_hold_out_are_read_and_the_same_as_todays(data, tmp_path):
    """They say where rows are drawn from, too, which means nothing beside --eval-data."""
    values = settings(parse([*data, "--eval-data", "b.jsonl"]))
    older = {**values, "held_out_from": "random" if data else "end"}
    file = config(tmp_path, "finetune.json", json.dumps(older))
    assert settings(parse(["--config", file])) == values
    assert decisive(values) == {name: value for name, value in older.items() if name in decisive(values)}
    drawn = config(tmp_path, "drawn.json", json.dumps(settings(parse(data))))
    assert settings(parse(["--config", drawn, "--eval-data", "b.jsonl"])) == values
    with pytest.raises(JobError, match="--eval-data and --held-out-from exclude each other"):
        parse(["--config", file, "--held-out-from", "end"])


def warmup(*words):
    from gralora_ext.cli.trainer import arguments

    return arguments(parse(["--output", "out", *words]), steps=20, use_cpu=True).warmup_steps


def test_a_part_of_no_steps_leaves_the_steps_of_the_warm_up_as_they_are():
    assert warmup("--warmup-steps", "5", "--warmup-ratio", "0") == 5
    assert warmup("--warmup-steps", "5") == 5
    assert warmup("--warmup-ratio", "0.1") == warmup("--warmup-steps", "0", "--warmup-ratio", "0.1") == 2
    assert warmup("--warmup-ratio", "0") == warmup() == 0


def test_a_tilde_is_the_home_folder_wherever_the_shell_leaves_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config(tmp_path, "c.yaml", "output: ~/runs/x\naccelerate_config: ~/a.yaml\n")
    for found in (
        parse(["--config=~/c.yaml"]),
        parse(["--output=~/runs/x", "--accelerate-config=~/a.yaml"]),
    ):
        assert (found.output, found.accelerate_config) == (f"{tmp_path}/runs/x", f"{tmp_path}/a.yaml")
        assert settings(found)["output"] == f"{tmp_path}/runs/x"


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
        ("r: 8\nlearnin_rate: 1\n", 2, "unknown option 'learnin_rate' (did you mean --learning-rate?)"),
        ("r: 8\nlearning_rate: no\n", 2, "argument learning_rate (here --lr): expected a positive number, got 'false'"),
        ("lora_r: 8\nrank: 4\n", 2, "'lora_r' and 'rank' are the same option"),
        ("resume: true\n", 1, "the option 'resume' belongs on the command line"),
        ("r: [8, 4]\n", 1, "single value"),
        ("target_modules: []\n", 1, "expected a value, got an empty group"),
        ("rank_pattern: 8\n", 1, "expected NAME=N or a JSON object, got '8'"),
        ("rank_pattern: {q_proj: 0}\n", 1, "at least 1, got '0'"),
        ("save_total_limit: 2\n", 1, "unknown option 'save_total_limit' (the last two checkpoints are kept)"),
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
        ("c.json", '{"r": 8, "r": 4}', "'r' is given twice"),
        ("c.yaml", "r: 8\nr: 4\n", "'r' is given twice"),
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
        (["--ranks", "4"], "unrecognized arguments: --ranks 4 (did you mean --rank?)"),
        (["--ste", "4"], "unrecognized arguments: --ste 4 (did you mean --steps?)"),
        (["--lrr", "4"], "unrecognized arguments: --lrr 4 (did you mean --lr?)"),
        (["--learnin_rate=4"], "(did you mean --learning-rate?)"),
        (["--learning_rate=-4"], "argument --learning_rate (here --lr): expected a positive number, got '-4'"),
        (["--logging_steps", "4"], "unrecognized arguments: --logging_steps 4 (each step is logged)"),
        (["--deepspeed=x.json"], "(it is in the file of --accelerate-config)"),
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
        (["--data", ""], "argument --data: expected a text, got an empty one"),
        (["--output", " "], "argument --output: expected a text, got an empty one"),
        (["--packing", "perhaps"], "argument --packing: expected true or false, got 'perhaps'"),
        (["--no-packing", "true"], "argument --packing: --no-packing takes no value"),
        (["--bf16", "--fp16"], "--bf16 and --fp16 exclude each other"),
        (["--warmup-steps", "3", "--warmup-ratio", "0.1"], "--warmup-steps and --warmup-ratio exclude each other"),
        (["--eval-split", "test"], "--eval-split needs --eval-data"),
        (["--prompt-field", "ask", "--text-field", "text"], "--text-field and --prompt-field exclude each other"),
        (["--optim", "sgd", "--adam-beta1", "0.8"], "--adam-beta1 is of AdamW and Lion, and --optim is sgd"),
        (["--optim", "lion_8bit", "--adam-epsilon", "1e-6"], "--adam-epsilon is of AdamW, and --optim is lion_8bit"),
        (["--k-pattern", "q_proj=4", "--backend", "lora"], "--k-pattern needs --backend fused, and it is lora"),
        (["--use-dora"], "--use-dora needs --backend lora, and it is fused"),
        (["--rank-pattern", "q_proj=4", "--backend", "peft"], "--rank-pattern needs --backend fused or lora"),
        (["--init-weights", "pissa"], "--init-weights pissa: with --backend fused there is true, false, gaussian"),
        (
            ["--init-weights", "lofq"],
            "invalid choice: 'lofq' (choose from gaussian, orthogonal, olora, pissa); true or",
        ),
        (["--exclude-modules", "(q_proj"], "--exclude-modules: '(q_proj' is not a regular expression"),
        (["--optim", "adam"], "argument --optim: invalid choice: 'adam' (choose from adamw_torch"),
        (["--trainable-token-indices", "-1"], "expected a whole number of at least 0, got '-1'"),
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


@pytest.mark.parametrize(
    ("words", "device", "quick", "slow"),
    [
        (["--dtype", "bf16"], "cpu", False, True),
        (["--bf16"], "cpu", False, True),
        (["--bf16"], "cpu", True, False),
        (["--bf16"], "cuda", False, False),
        ([], "cpu", False, False),
    ],
)
def test_bfloat16_is_slow_where_torch_has_only_plain_loops_for_it(monkeypatch, words, device, quick, slow):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: quick)
    assert is_slow_in_bf16(parse(words), device) == slow
