# SPDX-License-Identifier: Apache-2.0
"""``--packing``: rows share a sequence and do not see each other; losses are those of a plain loop over single rows."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch
from cli_helpers import call, conversations, make_chat_data, make_chat_model, make_data, make_model, metrics, sentence

from gralora_ext.cli import packing
from gralora_ext.cli.rows import Rows
from gralora_ext.program.errors import JobError

pytestmark = pytest.mark.usefixtures("no_plot")
STEPS, LR, LENGTH = 4, 0.02, 120
JOB = ("finetune", "--model", "model", "--data", "chat.jsonl", "--steps", STEPS, "--lr", LR, "--lora_r", 4, "--seed", 5)
JOB += ("--max-length", LENGTH, "--sample-tokens", 4, "--eval-every", STEPS, "--held-out", 4, "--output", "out")
# All packs in each step, so that it does not matter in which order they come.
PACKED = ("--packing", "--gradient-checkpointing")
bits4 = pytest.param(4, marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is missing"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    make_chat_model(folder / "model")
    make_chat_data(folder / "chat.jsonl", 12)
    return folder


def example(size):
    return {"input_ids": list(range(size)), "labels": list(range(size))}


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_every_row_once_and_are_few(seed):
    sizes = random.Random(seed).choices(range(2, 64), k=200)
    found = packing.packs([example(size) for size in sizes], 64)
    lengths = [[len(e["input_ids"]) for e in pack] for pack in found]
    assert sorted(size for pack in lengths for size in pack) == sorted(sizes)
    assert all(sum(pack) <= 64 for pack in lengths)
    assert len(found) <= 1.05 * sum(sizes) / 64 + 1
    assert packing.packs([example(3)], 3) == [[example(3)]]


def tokens_and_answers(tokenizer, messages):
    """As the template writes it, by hand: the tokens, and which of them are learned."""
    ids, learned = [], []
    for i, message in enumerate(messages):
        said = message["role"] == "assistant"
        end = "<eos>" if i == len(messages) - 1 else "<eos>\n"
        for text, is_answer in (
            (f"<{message['role']}>", False),
            (message["content"] + "<eos>", said),
            (end[5:], False),
        ):
            made = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, learned = ids + made, learned + [is_answer] * len(made)
    return ids, learned


def plain_loop(work, bits):
    """The losses of a loop with stock PEFT: one row at a time, the mean over all answer tokens of a step."""
    from peft import GraloraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    how = {}
    if bits == 4:
        quantized = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        }
        how = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **quantized), "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32, **how)
    set_seed(5)
    config = GraloraConfig(r=4, alpha=8, gralora_k=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    train, _ = Rows("chat", conversations(12)).split(4, seed=5)
    rows = [tokens_and_answers(tokenizer, messages) for messages in train]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (STEPS - step) / STEPS
        total, count = torch.zeros(()), 0
        for ids, learned in rows:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            chosen = [i for i in range(len(ids) - 1) if learned[i + 1]]
            target = torch.tensor([ids[i + 1] for i in chosen])
            total = total + torch.nn.functional.cross_entropy(logits[chosen], target, reduction="sum")
            count += len(chosen)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def packs_of(result):
    line = next(line for line in result.stdout.splitlines() if "packing: " in line)
    return int(line.split(" in ")[1].split(" packs")[0])


@pytest.mark.parametrize("bits", [None, bits4])
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.exhaustive)])
def test_losses_of_packed_chat_with_checkpointing_are_those_of_a_plain_loop(work, attention, bits):
    quantized = (f"--load-in-{bits}bit",) if bits else ()
    job = (*JOB, *PACKED, *quantized, "--attn-implementation", attention, "--batch-size", 100)
    done = call(*job, cwd=work)
    assert done.returncode == 0, done.stderr
    assert packs_of(done) < 8  # of eight rows
    found = [entry["loss"] for entry in metrics(work / "out")["losses"]]
    expected = plain_loop(work, bits)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[0] > 1.2 * found[-1]


def test_several_passes_in_a_step_have_the_losses_of_one(work):
    losses = []
    for batch, accumulated in ((100, 1), (1, 4)):
        done = call(*JOB, *PACKED, "--no-merge", "--batch-size", batch, "--grad-accum", accumulated, cwd=work)
        assert done.returncode == 0, done.stderr
        assert packs_of(done) == 4
        losses.append([entry["loss"] for entry in metrics(work / "out")["losses"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_adapter_of_the_packed_job_loads_in_stock_peft_and_merges(work):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert call(*JOB, *PACKED, cwd=work).returncode == 0
    base = AutoModelForCausalLM.from_pretrained(work / "model")
    adapted = PeftModel.from_pretrained(base, work / "out" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(work / "out" / "merged").eval()
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


def test_packed_job_resumes_to_the_last_bit(work):
    job = (*JOB, *PACKED, "--no-merge", "--batch-size", 1, "--dropout", 0.1, "--lr-schedule", "constant")
    assert call(*job, "--output", "whole", "--steps", 4, cwd=work).returncode == 0
    assert call(*job, "--output", "half", "--steps", 2, cwd=work).returncode == 0
    assert call(*job, "--output", "half", "--steps", 4, "--resume", cwd=work).returncode == 0
    whole, half = (work / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "half"))
    assert whole.read_bytes() == half.read_bytes()


def test_epochs_are_counted_in_packs(work):
    job = [*JOB[:5], *JOB[7:]]
    done = call(*job, "--packing", "--batch-size", 1, "--no-merge", "--epochs", 2, cwd=work)
    assert done.returncode == 0, done.stderr
    values = metrics(work / "out")
    assert values["steps"] == 2 * packs_of(done) and values["epochs"] == 2 and values["train_rows"] == 8


def test_a_model_whose_rows_see_each_other_is_refused(work, monkeypatch):
    """As where an attention does not look at positions: here all rows lie in one sequence whose positions run on."""
    right = packing._inputs

    def run_on(batch, device):
        made = right(batch, device)
        made["position_ids"] = torch.arange(made["input_ids"].shape[1])[None]
        return made

    monkeypatch.setattr(packing, "_inputs", run_on)
    result = call(*JOB, "--packing", cwd=work)
    assert result.returncode == 2
    assert "--packing: in this model the tokens of one row see those of another" in sentence(result)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attentions_of_the_cpu_keep_rows_apart(work, attention):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "model", attn_implementation=attention)
    packing.check(model, [example(9), example(14)], attention, None)
    with pytest.raises(JobError, match="the tokens of one row see those of another with sdpa attention"):
        packing.check(_Leaky(), [example(4), example(5)], "sdpa", None)


def test_packing_pairs_has_no_padding(tmp_path):
    make_model(tmp_path / "model")
    make_data(tmp_path / "chat.jsonl")
    done = call(*JOB, "--packing", "--no-merge", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = metrics(tmp_path / "out")
    assert values["epochs"] > 0 and all(entry["tokens"] <= 4 * LENGTH for entry in values["losses"])


class _Leaky(torch.nn.Module):
    """A model in which all tokens of a sequence see each other."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 8)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, position_ids, use_cache):
        class Output:
            logits = self.embedding(input_ids) + self.embedding(input_ids).sum(1, keepdim=True)

        return Output
