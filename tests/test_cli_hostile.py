# SPDX-License-Identifier: Apache-2.0
"""Hostile rows, files, configurations and command lines: each is one sentence with exit code 2, and nothing is left behind."""

from __future__ import annotations

import json
import os
import time

import pytest
from cli_helpers import call, make_data, make_model, sentence

JOB = ("finetune", "--model", "model", "--data", "data.jsonl", "--output", "out", "--steps", "1", "--max-length", "64")
PAIR = '{"question": "q", "answer": "a"}'

# What is no text, and no number, where one is expected.
NO_TEXTS = {
    "null": None,
    "number": 7,
    "real": 1.5,
    "bool": True,
    "list": ["x"],
    "object": {"x": 1},
    "empty": "",
    "blank": " \t",
}
ROWS = {f"{field} is {name}": {"question": "q", "answer": "a", field: value} for field in ("question", "answer")
        for name, value in NO_TEXTS.items()}  # fmt: skip
ROWS |= {f"prompt is {name}": {"prompt": value, "completion": "c"} for name, value in NO_TEXTS.items()}
ROWS |= {f"output is {name}": {"instruction": "i", "output": value} for name, value in NO_TEXTS.items()}
ROWS |= {f"text is {name}": {"text": value} for name, value in NO_TEXTS.items()}
ROWS |= {f"messages is {name}": {"messages": value} for name, value in NO_TEXTS.items()}
ROWS |= {f"a message is {name}": {"messages": [value]} for name, value in NO_TEXTS.items()}
ROWS |= {f"a role is {name}": {"messages": [{"role": value, "content": "x"}]} for name, value in NO_TEXTS.items()}
ROWS |= {
    f"a content is {name}": {"messages": [{"role": "assistant", "content": value}]}
    for name, value in NO_TEXTS.items()
    if name not in ("empty", "blank")  # an assistant may say nothing
}
ROWS |= {
    "other fields": {"q": "x", "a": "y"},
    "no fields": {},
    "field of another case": {"Question": "q", "Answer": "a"},
    "half of a pair": {"question": "q"},
    "half of another pair": {"prompt": "q"},
    "half of a surrogate pair": {"question": "q\ud800", "answer": "a"},
    "messages with half of a surrogate pair": {"messages": [{"role": "assistant", "content": "\udfff"}]},
    "message without content": {"messages": [{"role": "user"}]},
    "message without role": {"messages": [{"content": "x"}]},
    "conversation without an answer": {"messages": [{"role": "user", "content": "x"}]},
    "conversation of two lists": {"messages": [[{"role": "user", "content": "x"}]]},
    "ShareGPT's without value": {"conversations": [{"from": "gpt"}]},
}
LINES = {
    "not JSON": b"question: q",
    "cut": b'{"question": "q", "ans',
    "no quotes": b"{question: 1}",
    "single quotes": b"{'question': 'q', 'answer': 'a'}",
    "two objects": b'{"question": "q", "answer": "a"} {"question": "q", "answer": "a"}',
    "comma at the end": b'{"question": "q", "answer": "a"},',
    "a list": b'["q", "a"]',
    "a text": b'"q"',
    "a number": b"7",
    "true": b"true",
    "null": b"null",
    "not a number": b"NaN",
    "control character": b'{"question": "q\x01", "answer": "a"}',
    "NUL": b"\x00",
    "Latin-1": b'{"question": "\xe9", "answer": "a"}',
    "UTF-16": '{"question": "q", "answer": "a"}'.encode("utf-16"),
    "overlong UTF-8": b'{"question": "\xc0\xaf", "answer": "a"}',
    "surrogate in UTF-8": b'{"question": "\xed\xa0\x80", "answer": "a"}',
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff",
    "deep": b"[" * 50_000,
    "deep objects": b'{"a":' * 50_000,
    "long number": b'{"question": "q", "answer": "a", "n": ' + b"9" * 5000 + b"}",
    "bad escape": rb'{"question": "\x41", "answer": "a"}',
    "bad unicode escape": rb'{"question": "\u12", "answer": "a"}',
    "HTML": b"<!DOCTYPE html>",
}
FILES = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n \n",
    "one.jsonl": PAIR.encode(),
    "empty.json": b"",
    "empty-list.json": b"[]",
    "cut-list.json": b'[{"question": "q", "answer": "a"}',
    "open-list.json": b"[",
    "nested.json": b'[[{"question": "q", "answer": "a"}]]',
    "pretty.json": b'{\n "question": "q",\n "answer": "a"\n}',
    "wrapped.json": b'{"data": [{"question": "q", "answer": "a"}]}',
    "trailing.json": b'[{"question": "q", "answer": "a"}, ]',
    "no-comma.json": b'[{"question": "q", "answer": "a"} {"question": "q", "answer": "a"}]',
    "deep.json": b"[" * 50_000,
    "empty.csv": b"",
    "header.csv": b"question,answer\n",
    "short.csv": b"question,answer\nq,a\nq\n",
    "long.csv": b"question,answer\nq,a\nq,a,b\n",
    "quote.csv": b'question,answer\nq,"a\n',
    "after-quote.csv": b'question,answer\nq,"a"x\n',
    "twice.csv": b"question,question\nq,a\nq,a\n",
    "semicolon.csv": b"question;answer\nq;a\nq;a\n",
    "latin.csv": b"question,answer\n\xe9,a\nq,a\n",
    "nul.csv": b"question,answer\nq\x00,\nq,a\n",
    "comma.tsv": b"question,answer\nq,a\nq,a\n",
    "empty.parquet": b"",
    "magic.parquet": b"PAR1",
    "text.parquet": b"question,answer\nq,a\n",
    "cut.parquet": b"PAR1" + b"\x00" * 100 + b"PAR1",
    "zip.jsonl": b"PK\x03\x04" + b"\x00" * 60,
    "random.jsonl": bytes(range(256)) * 4,
}
CONFIGS = {
    "a.json": "",
    "b.json": "[]",
    "c.json": "7",
    "d.json": "null",
    "e.json": '"lr"',
    "f.json": '{"lr": 1,}',
    "g.json": '{"lr": 1',
    "h.json": "{lr: 1}",
    "i.json": '{"lr": NaN}',
    "j.json": '{"lr": 1e999}',
    "k.json": '{"lr": 1, "lr": 2}',
    "l.json": '{"lr": 1, "learning_rate": 2}',
    "m.json": '{"": 1}',
    "n.json": '{"lrr": 1}',
    "o.json": '{"lr": {"x": 1}}',
    "p.json": '{"lr": [1]}',
    "q.json": '{"lr": "fast"}',
    "r.json": '{"r": 1.5}',
    "s.json": '{"r": true}',
    "t.json": '{"target_modules": []}',
    "u.json": '{"target_modules": [["q_proj"]]}',
    "v.json": '{"target_modules": {"q_proj": 1}}',
    "w.json": '{"rank_pattern": {"q_proj": {"x": 1}}}',
    "x.json": '{"rank_pattern": {}}',
    "y.json": '{"rank_pattern": ["q_proj"]}',
    "z.json": '{"packing": "perhaps"}',
    "A.json": '{"packing": 2}',
    "B.json": '{"no_packing": true}',
    "C.json": '{"config": "a.json"}',
    "D.json": '{"debug": true}',
    "E.json": '{"help": true}',
    "F.json": '{"model": ""}',
    "G.json": '{"data": ["data.jsonl", ""]}',
    "H.json": r'{"chat_template": "a\u0000b"}',
    "I.json": r'{"chat_template": "\ud800"}',
    "J.json": '{"seed": -1}',
    "K.json": '{"steps": 1, "epochs": 1}',
    "L.json": '{"fp16": true, "bf16": true}',
    "M.json": '{"target_modules": ["q_proj", "--lr", "-x"]}',
    "N.json": '{"trainable_token_indices": {"embed_tokens": "x"}}',
    "O.json": "[" * 50_000,
    "P.json": '{"x":' * 50_000,
    "Q.json": '{"r": ' + "9" * 5000 + "}",
    "a.yaml": "lr: [1\n",
    "b.yaml": "lr: 1\n lr: 2\n",
    "c.yaml": "\tlr: 1\n",
    "d.yaml": "lr: 1\nlr: 2\n",
    "e.yaml": "- lr\n",
    "f.yaml": "lr\n",
    "g.yaml": "lr: !!python/object/apply:os.system ['true']\n",
    "h.yaml": "--- \nlr: 1\n---\nlr: 2\n",
    "i.yaml": "lr: .inf\n",
    "j.yaml": "lr: 2024-01-01\n",
    "k.yaml": "lr: 2024-13-01\n",
    "l.yaml": "1: 2\n",
    "m.yaml": "[1]: 2\n",
    "n.yaml": "? {a: 1}\n: 2\n",
    "o.yaml": "lr: *x\n",
    "p.yaml": "lr: &x [*x]\n",
    "q.yaml": "rank_pattern: &x {q_proj: *x}\n",
    "r.yaml": "a: &a [x, x]\nb: &b [*a, *a]\n" * 1,
    "s.yaml": "report_to: [none, wandb]\n",
    "t.yaml": "report_to: mlflow\n",
    "u.yaml": "optim: adam\n",
    "v.yaml": "data: {train: x}\n",
    "w.yaml": "lr: 1\x00\n",
    "x.yaml": "%YAML 9\n",
    "y.yaml": "[" * 5000,
    "z.yaml": "deepspeed: zero3.json\n",
    "a.toml": "lr = 1\n",
    "noending": "lr: 1\n",
}
WORDS = {
    "unknown": ("--lrr", "1"),
    "of an option of Trainer": ("--logging_steps", "1"),
    "short": ("-r", "1"),
    "alone": ("word",),
    "a dash": ("-",),
    "empty": ("",),
    "two dashes and a word": ("--", "x"),
    "no name": ("--=1",),
    "no value": ("--lr",),
    "an option for a value": ("--lr", "--steps", "1"),
    "two dashes for a value": ("--lr=--",),
    "empty value": ("--lr=",),
    "words": ("--lr", "fast"),
    "comma": ("--lr", "0,001"),
    "inf": ("--lr", "inf"),
    "nan": ("--lr", "nan"),
    "zero": ("--lr", "0"),
    "negative": ("--lr", "-1"),
    "real for whole": ("--r", "1e3"),
    "huge": ("--r", "9" * 5000),
    "large": ("--steps", str(2**31)),
    "seed": ("--seed", "-1"),
    "dropout of one": ("--dropout", "1"),
    "k over r": ("--k", "32"),
    "k of zero": ("--k", "0"),
    "k in words": ("--k", "automatic"),
    "switch": ("--packing", "2"),
    "negated switch with a value": ("--no-packing=true",),
    "negated value": ("--no-lr",),
    "twice negated": ("--no-no-packing",),
    "bad pattern": ("--rank-pattern", "q_proj"),
    "pattern without a name": ("--rank-pattern", "=8"),
    "pattern of zero": ("--rank-pattern", "q_proj=0"),
    "pattern of bad JSON": ("--rank-pattern", '{"q_proj": 8'),
    "pattern of a JSON list": ("--rank-pattern", "{[]}"),
    "bad regular expression": ("--target-modules", "(q_proj"),
    "long regular expression": ("--target-modules", "(" * 50_000),
    "bad exclusion": ("--exclude-modules", "[q"),
    "tokens": ("--trainable-token-indices", "x"),
    "choices": ("--optim", "adam"),
    "attention": ("--attn-implementation", "flash"),
    "dtype": ("--dtype", "int4"),
    "two lengths": ("--epochs", "1"),
    "two quantizations": ("--load-in-4bit", "--load-in-8bit"),
    "two kinds of autocast": ("--bf16", "--fp16"),
    "LoRA's alone": ("--use-dora",),
    "another backend's": ("--backend", "peft", "--use-rslora"),
    "pattern without layers": ("--layers-pattern", "h"),
    "eval data and held out": ("--eval-data", "data.jsonl", "--held-out", "3"),
    "all held out": ("--held-out", "48"),
    "missing data": ("--data", "data.jsonl", "nowhere.jsonl"),
    "missing eval data": ("--eval-data", "nowhere.parquet"),
    "a device for data": ("--data", "/dev/zero"),
    "a pipe for data": ("--data", "./pipe"),
    "a loop for data": ("--data", "./loop.jsonl"),
    "a folder for a file": ("--data", "folder.jsonl"),
    "long path": ("--data", "x" * 300 + ".jsonl"),
    "home of nobody": ("--data", "~nobody-of-this-name/x.jsonl"),
    "line break in a name": ("--data", "./a\nb\x1b[31m.jsonl"),
    "missing template": ("--chat-template", "nowhere.jinja"),
    "template that is none": ("--chat-template", "template-syntax"),
    "template of bytes": ("--chat-template", "template-bytes"),
    "empty template": ("--chat-template", "template-empty"),
    "folder for a template": ("--chat-template", "model"),
    "missing model": ("--model", "./nowhere"),
    "file for a model": ("--model", "data.jsonl"),
    "folder without a model": ("--model", "folder.jsonl"),
    "file for an output": ("--output", "data.jsonl"),
    "device for an output": ("--output", "/dev/null"),
    "output below a file": ("--output", "data.jsonl/out"),
    "model for an output": ("--output", "model"),
    "missing configuration": ("--config", "nowhere.yaml"),
    "folder for a configuration": ("--config", "folder.json"),
    "configuration of bytes": ("--config", "bytes.json"),
}
CASES = [
    *(pytest.param("row", json.dumps(row).encode(), id=f"row: {name}") for name, row in ROWS.items()),
    *(pytest.param("line", line, id=f"line: {name}") for name, line in LINES.items()),
    *(pytest.param(name, content, id=f"file: {name}") for name, content in FILES.items()),
    *(pytest.param(name, text, id=f"configuration: {name}") for name, text in CONFIGS.items()),
    *(pytest.param("words", words, id=f"words: {name}") for name, words in WORDS.items()),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    for name in ("folder.json", "folder.jsonl"):
        (folder / name).mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    for name, content in (("syntax", b"{% for %}"), ("bytes", b"\xff"), ("empty", b"")):
        (folder / f"template-{name}").write_bytes(content)
    (folder / "bytes.json").write_bytes(b"\xff\xfe{")
    return folder


@pytest.mark.parametrize(("what", "content"), CASES)
def test_it_is_one_sentence_and_leaves_nothing(work, what, content):
    more: tuple[str, ...] = ()
    if what == "words":
        more = content
    elif isinstance(content, str):
        (work / what).write_text(content)
        more = ("--config", what)
    elif what in ("row", "line"):
        # First of the file, so that it tells the format, and after a good line.
        what = "first.jsonl" if what == "row" else "second.jsonl"
        good = b"" if what == "first.jsonl" else PAIR.encode() + b"\n"
        (work / what).write_bytes(good + content + b"\n")
        more = ("--data", what)
    else:
        (work / what).write_bytes(content)
        more = ("--data", what)
    before, start = sorted(work.rglob("*")), time.perf_counter()
    job = [word for word in JOB if word not in ("--steps", "1")] if "--config" in more else JOB
    result = call(*job, *more, cwd=work)
    assert result.returncode == 2, result.stdout + result.stderr
    line = sentence(result)
    assert line.startswith("gralora-ext: error: ") and len(line) < 450 and line.isprintable()
    assert sorted(work.rglob("*")) == before
    assert time.perf_counter() - start < 20


def test_there_are_two_hundred_of_them_and_more():
    assert len(CASES) >= 200 and len({case.id for case in CASES}) == len(CASES)
