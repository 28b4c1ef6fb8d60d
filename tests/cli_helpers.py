# SPDX-License-Identifier: Apache-2.0
"""What the tests of the command line share: a tiny model and its data, and the program as a process of its own."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gralora_ext

# A chat template as most are: who speaks, what is said, an end token and a line break.
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")


def make_model(folder: Path) -> Path:
    """A random Llama of two layers with a byte-level tokenizer; every width divides by 2 and 4, and none by 3."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # large enough for an adapter to learn much in a few steps
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_data(file: Path, rows: int = 48, times: int = 5) -> Path:
    """Questions about words, each with the answer that it asks for. With 9 ``times`` the first 72 rows differ."""
    lines = []
    for i in range(rows):
        word = WORDS[i % len(WORDS)]
        lines.append(
            json.dumps({"question": f"{i % times} times {word}?", "answer": " ".join([word] * (i % times)) or "none"})
        )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def make_chat_model(folder: Path, template: str = CHAT) -> Path:
    """The same with a chat template."""
    make_model(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def conversations(rows: int = 24) -> list[list[dict[str, str]]]:
    """A question and its answer each, and every third goes on with another."""
    found = []
    for i in range(rows):
        first, second = WORDS[i % len(WORDS)], WORDS[(3 * i + 1) % len(WORDS)]
        texts = (f"{first} {i % 5}", " ".join([first] * (i % 5)) or "none", f"and {second}", f"{second} {first}")
        texts = texts[: 2 if i % 3 else 4]
        found.append([{"role": ("user", "assistant")[j % 2], "content": text} for j, text in enumerate(texts)])
    return found


def make_chat_data(file: Path, rows: int = 24) -> Path:
    lines = [json.dumps({"messages": messages}) for messages in conversations(rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, with the gralora_ext that the tests import and no hub to wait for.

    Without what `finetune` sets for its process, which is this one where a test calls it: without a terminal, no bars.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    paths = [str(Path(gralora_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def start(*arguments: object, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """``gralora-ext`` with ``arguments``, its output unbuffered in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "gralora_ext", *map(str, arguments)],
        cwd=cwd,
        env=options.pop("env", environment()),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def finish(process: subprocess.Popen[str], read: str = "") -> subprocess.CompletedProcess[str]:
    """Waits for the end; ``read`` is what was taken from its stdout before."""
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, read + out, err)


def run(*arguments: object, cwd: Path, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the program to its end, which must come with ``code`` and, whatever the code, without a traceback."""
    result = finish(start(*arguments, cwd=cwd, **options))
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has the libraries loaded: a tenth of the time."""
    from gralora_ext.cli import main

    words, out, err = list(map(str, arguments)), io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with own_signals(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    finally:
        os.chdir(before)
        freeze()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


modules = 0


def freeze() -> None:
    """Hides what the libraries hold from the collector of garbage, which else takes most of a short job's time."""
    global modules  # that were loaded the last time
    if len(sys.modules) > modules + 100:
        modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """The program takes over the signals of the process that it runs in; at the end they are as before."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_at(text: str, signum: signal.Signals, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the program, and sends it ``signum`` when a line of its output holds ``text``."""
    process = start(*arguments, cwd=cwd)
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            process.send_signal(signum)
            break
    return finish(process, read)


def metrics(output: Path) -> dict[str, Any]:
    """What metrics.json holds, which must be JSON to the letter: no NaN, no infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads((output / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)


def same_end(ours: Path, theirs: Path) -> None:
    """The same losses and the same adapter, to the last bit."""
    values = metrics(ours), metrics(theirs)
    for name in ("losses", "eval_losses"):
        first, second = ([(e["step"], e["loss"]) for e in v[name]] for v in values)
        assert first == second
    assert values[0]["samples"] == values[1]["samples"]
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (ours, theirs)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def until(step: int, whole: Path, part: Path) -> None:
    """Makes ``part`` what a job of the settings of ``whole`` leaves where it is stopped after ``step``."""
    (part / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "finetune.json", part)
    shutil.copytree(whole / "checkpoints" / f"checkpoint-{step}", part / "checkpoints" / f"checkpoint-{step}")


def sentence(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed run must have left on stderr."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]
