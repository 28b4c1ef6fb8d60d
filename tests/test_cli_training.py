# SPDX-License-Identifier: Apache-2.0
"""What users of Trainer expect: optimizers, autocast, checkpointing, noise; each resumes exactly, and resume checks each."""

from __future__ import annotations

import json
import shutil
import sys
import types
from importlib.util import find_spec

import pytest
from cli_helpers import call, make_data, make_model, metrics, same_end, sentence, until
from transformers import AutoTokenizer

from gralora_ext.cli.option_table import BITSANDBYTES_OPTIMIZERS, OPTIMIZERS, OPTIONS, REPORTERS
from gralora_ext.cli.options import decisive, parse, settings

pytestmark = pytest.mark.usefixtures("no_plot")
JOB = ("finetune", "--model", "model", "--data", "data.jsonl", "--batch-size", 2, "--r", 4, "--lr", 0.01)
JOB += ("--lr-schedule", "constant", "--max-length", 64, "--sample-tokens", 2, "--eval-every", 2, "--no-merge")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    return folder


def run(work, output, *more):
    done = call(*JOB, "--output", output, *more, cwd=work)
    assert done.returncode == 0, done.stderr
    return metrics(work / output)


def losses(values):
    return [entry["loss"] for entry in values["losses"]]


@pytest.fixture(scope="module")
def plain(work):
    """The job without any of the options."""
    return run(work, "plain", "--steps", 4)


VARIANTS = {
    **{f"optim {name}": ("--optim", name) for name in OPTIMIZERS},
    **{f"optim {name}": ("--optim", name) for name in BITSANDBYTES_OPTIMIZERS},
    "bf16": ("--bf16",),
    "neftune": ("--neftune-noise-alpha", 5),
    "checkpointing and dropout": ("--gradient-checkpointing", "--dropout", 0.2),
    "weight decay": ("--weight-decay", 0.5),
    "norm": ("--max-grad-norm", 0.1),
    "betas": ("--adam-beta1", 0.5, "--adam-beta2", 0.9, "--adam-epsilon", 1e-3),
    "warmup": ("--warmup-ratio", 0.5, "--lr-schedule", "cosine"),
    "eager": ("--attn-implementation", "eager"),
}


# Trainer makes the optimizers, all in the same way.
SHOWN = {"optim adafactor", "optim sgd", *(name for name in VARIANTS if not name.startswith("optim"))}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHOWN else pytest.mark.exhaustive) for name in VARIANTS]
)
def test_job_with_it_trains_and_resumes_to_the_last_bit(work, plain, name):
    if any(other in name for other in BITSANDBYTES_OPTIMIZERS) and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    more = VARIANTS[name]
    whole = run(work, "whole", "--steps", 4, "--save-every", 2, *more)
    if "adamw" not in name and name != "eager":  # AdamW is the default, and small tensors have no 8-bit moments
        assert losses(whole) != losses(plain)
    # The schedule depends on the number of steps: the job is stopped by a copy of its checkpoint.
    shutil.rmtree(work / "half", ignore_errors=True)
    until(2, work / "whole", work / "half")
    run(work, "half", "--steps", 4, "--resume", *more)
    same_end(work / "half", work / "whole")


@pytest.mark.parametrize(
    "backend", ["fused", *(pytest.param(b, marks=pytest.mark.exhaustive) for b in ("peft", "lora"))]
)
def test_gradient_checkpointing_changes_no_bit_and_may_be_added_to_a_resumed_job(work, backend):
    job = ("--backend", backend, "--dropout", 0.2)
    whole = run(work, "kept", "--steps", 4, *job)
    assert losses(run(work, "checkpointing", "--steps", 4, "--gradient-checkpointing", *job)) == losses(whole)
    run(work, "checkpointing", "--steps", 2, *job)
    assert losses(run(work, "checkpointing", "--steps", 4, "--gradient-checkpointing", "--resume", *job)) == losses(
        whole
    )


def test_each_step_has_its_rate_and_its_norm_before_it_is_cut(work):
    rates = {}
    for norm in (0, 1e-3):
        entries = run(work, "series", "--steps", 4, "--lr-schedule", "linear", "--max-grad-norm", norm)["losses"]
        assert [e["learning_rate"] for e in entries] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
        rates[norm] = [e["gradient_norm"] for e in entries]
        assert all(value > 0.1 for value in rates[norm])
    assert rates[0][0] == rates[1e-3][0]


def test_evaluation_uses_autocast_as_training_does(work, plain):
    values = run(work, "autocast", "--steps", 2, "--bf16")
    before = plain["eval_loss_before"]
    assert values["eval_loss_before"] != before and values["eval_loss_before"] == pytest.approx(before, rel=0.02)


def test_merged_model_of_a_job_with_autocast_is_proved_equal(work):
    done = call(*JOB[:-1], "--merge", "--bf16", "--steps", 2, "--output", "merged", cwd=work)
    assert done.returncode == 0, done.stderr
    assert metrics(work / "merged")["merged_logits"]["relative"] < 1e-5


def test_float16_without_cuda_is_one_sentence(work):
    done = call(*JOB, "--fp16", "--device", "cpu", "--output", "none", cwd=work)
    assert done.returncode == 2 and "--fp16 needs a CUDA device" in sentence(done)


def test_attention_that_is_not_here_is_one_sentence(work):
    job = (*JOB, "--attn-implementation", "flash_attention_2", "--output", "none")
    done = call(*job, cwd=work)
    assert done.returncode == 2 and "flash_attention_2 needs --dtype bf16: it has no float32" in sentence(done)
    done = call(*job, "--dtype", "bf16", cwd=work)
    assert done.returncode == 2 and "--attn-implementation flash_attention_2 does not work with model here" in sentence(
        done
    )


OTHER_VALUES = {
    "r": ("--r", "8"),
    "k": ("--k", "4"),
    "backend": ("--backend", "peft"),
    "init-weights": ("--init-weights", "gaussian"),
    "held-out-from": ("--held-out-from", "random"),
    "eval-rows-from": ("--eval-rows-from", "all"),
    "eval-split": ("--eval-data", "x", "--eval-split", "test"),
    "optim": ("--optim", "sgd"),
    "lr-schedule": ("--lr-schedule", "cosine"),
    "dtype": ("--dtype", "bf16"),
    "device": ("--device", "cpu"),
    "attn-implementation": ("--attn-implementation", "eager"),
    "use-dora": ("--backend", "lora", "--use-dora"),
    "bias": ("--bias", "all"),
    "lora-bias": ("--backend", "lora", "--lora-bias"),
    "layers-pattern": ("--layers-to-transform", "1", "--layers-pattern", "h"),
    "warmup-ratio": ("--warmup-ratio", "0.5"),
    "answers-only": ("--no-answers-only",),
}


@pytest.mark.parametrize("name", [option.name for option in OPTIONS.values() if not option.free])
def test_resume_checks_every_option_that_decides_numbers(name):
    option = OPTIONS[name.replace("-", "_")]
    value = OTHER_VALUES.get(name)
    if value is None and option.kind.is_switch:
        value = (f"--{name}",)
    if value is None:
        value = next((f"--{name}", word) for word in ("3", "0.5", "x", "x=3") if _is_read(option, word))
    changed = decisive(settings(parse(list(value))))
    assert changed.get(option.key) != decisive(settings(parse([]))).get(option.key)


def _is_read(option, word):
    try:
        return option.kind.read(word) not in (option.default, None)
    except ValueError:
        return False


@pytest.mark.parametrize("change", [("--weight-decay", 0.1), ("--packing",), ("--neftune-noise-alpha", 3), ("--bf16",)])
def test_resume_refuses_a_changed_option_by_name(work, plain, change):
    done = call(*JOB, "--steps", 5, "--output", "plain", "--resume", *change, cwd=work)
    assert done.returncode == 2 and f"was made with {change[0]} " in sentence(done)


def test_reporting_may_change_between_a_job_and_its_end(work, plain):
    assert "report_to" not in decisive(settings(parse(["--report-to", "wandb"])))


@pytest.mark.parametrize("name", REPORTERS)
def test_a_missing_reporter_is_one_sentence(work, name, monkeypatch):
    from gralora_ext.cli import checks

    there = checks.importlib.util.find_spec
    missing = REPORTERS[name]
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda n: None if n in missing else there(n))
    done = call(*JOB, "--report-to", name, "--output", "none", cwd=work)
    assert done.returncode == 2 and sentence(done).endswith(f"--report-to {name} needs {name}: `pip install {name}`")


def test_tensorboard_gets_each_step(work):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = run(work, "board", "--steps", 3, "--report-to", "tensorboard")
    events = EventAccumulator(str(work / "board" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(values))
    assert [e.step for e in events.Scalars("train/grad_norm")] == [1, 2, 3]
    assert [e.step for e in events.Scalars("eval/loss")] == [0, 2, 3]


def test_a_reporter_that_refuses_is_one_sentence_before_anything_is_trained(work, monkeypatch):
    def refuse(**how):
        raise RuntimeError("api_key not configured (no-tty)")

    fake = types.ModuleType("wandb")
    fake.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("gralora_ext.cli.job.check_needed", lambda options: None)
    done = call(*JOB, "--report-to", "wandb", "--output", "refused", cwd=work)
    assert done.returncode == 2
    assert "--report-to wandb: api_key not configured (no-tty) (`wandb login`, or WANDB_MODE=offline)" in sentence(done)
    assert not (work / "refused" / "checkpoints").exists()


@needs_bitsandbytes
def test_eight_bit_optimizer_without_its_package_is_one_sentence(work, monkeypatch):
    from gralora_ext.cli import checks

    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Exception, match="--optim lion_8bit needs bitsandbytes: `pip install bitsandbytes`"):
        checks.check_needed(parse(["--optim", "lion_8bit"]))


def test_a_model_that_takes_no_number_of_tokens_has_the_mean_over_all_tokens_too(work, plain, monkeypatch):
    """Gemma 3n is one: Trainer would take the mean of its batches' means."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    losses = {}
    for rows, batches in ((4, 1), (1, 4)):
        output = f"mean-{rows}"
        done = call(*JOB, "--batch-size", rows, "--grad-accum", batches, "--steps", 4, "--output", output, cwd=work)
        assert done.returncode == 0, done.stderr
        losses[rows] = [e["loss"] for e in metrics(work / output)["losses"]]
    assert losses[1] == pytest.approx(losses[4], rel=1e-5)


def test_one_process_trains_on_one_device(monkeypatch):
    from transformers import TrainingArguments

    from gralora_ext.cli.trainer import arguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    assert arguments(parse(["--output", "out"]), 1, use_cpu=True)._n_gpu == 1


def test_no_memory_for_the_merged_model_tells_of_the_checkpoint_and_how_to_do_without(work, monkeypatch):
    monkeypatch.setattr("gralora_ext.cli.results.write_merged", raising(MemoryError))
    job = (*JOB, "--steps", 2, "--output", "no-memory")
    done = call(*job, "--merge", cwd=work)
    assert done.returncode == 2
    said = sentence(done)
    assert (
        "out of memory, when results were written" in said and "is saved; go on with `" in said and "--no-merge" in said
    )
    monkeypatch.undo()
    assert call(*job, "--resume", "--no-merge", cwd=work).returncode == 0
    assert (work / "no-memory" / "adapter").is_dir()


def raising(error):
    def raises(*arguments):
        raise error

    return raises


def test_the_precision_of_accelerates_environment_is_not_the_jobs(work, plain, monkeypatch):
    """`accelerate launch` sets it, for one process too."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert losses(run(work, "precision", "--steps", 4)) == losses(plain)


def test_a_padding_token_that_the_model_lacks_is_no_obstacle(work, plain):
    """Llama 2's tokenizers with a [PAD] of their own are such."""
    folder = shutil.copytree(work / "model", work / "other-pad")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id == json.loads((folder / "config.json").read_text())["vocab_size"]
    assert losses(run(work, "padded", "--model", "other-pad", "--steps", 4)) == losses(plain)
