# SPDX-License-Identifier: Apache-2.0
"""Rows and their tokens: what is read, what is held out, and that the loss is on the answers alone."""

from __future__ import annotations

import json

import pytest
import torch
from cli_helpers import CHAT, make_data, make_model

from gralora_ext.cli.data import IGNORED, Encoder
from gralora_ext.cli.rows import Fields, Rows, read_rows
from gralora_ext.program.errors import JobError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("data") / "model"))


def test_rows_come_in_the_files_order_and_the_last_are_held_out(tmp_path):
    rows = read_rows([str(make_data(tmp_path / "d.jsonl", 50))])
    train, held_out = rows.split(0)
    assert len(rows.rows) == 50 and len(held_out) == 10
    assert train + held_out == rows.rows
    assert rows.split(3) == (rows.rows[:-3], rows.rows[-3:])


def test_default_holds_out_a_fifth_but_at_most_two_hundred_rows():
    sizes = {n: len(Rows("x", [("q", "a")] * n).split(0)[1]) for n in (2, 10, 1319)}
    assert sizes == {2: 1, 10: 2, 1319: 200}


def test_fields_are_chosen_and_blank_lines_and_a_byte_order_mark_do_not_matter(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_bytes('\ufeff{"q": "1", "a": "é"}\n\n{"q": "2", "a": "b", "more": [3]}\r\n'.encode())
    assert read_rows([str(file)], Fields("q", "a")).rows == [("1", "é"), ("2", "b")]


GOOD = '{"question": "q", "answer": "a"}'


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"question": "q", answer: 1}', "not a JSON object: Expecting property name"),
        ('["q", "a"]', "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
        ('{"question": "q", "reply": "a"}', "'answer' (--answer-field) is missing; the row has 'question', 'reply'"),
        ('{"question": 7, "answer": "a"}', "'question' (--prompt-field) must be a text, got int"),
        ('{"question": "q", "answer": " "}', "'answer' (--answer-field) must be a text, got an empty text"),
        (r'{"question": "q", "answer": "\ud83d"}', "has half of a surrogate pair"),
        (b'{"question": "\xff", "answer": "a"}', "not UTF-8 text"),
        ("[" * 100_000, "not a JSON object"),
    ],
)
def test_bad_row_is_named_with_its_line(tmp_path, bad, says):
    file = tmp_path / "d.jsonl"
    file.write_bytes(
        f"{GOOD}\n\n".encode() + (bad if isinstance(bad, bytes) else bad.encode()) + f"\n{GOOD}\n".encode()
    )
    with pytest.raises(JobError) as error:
        read_rows([str(file)])
    assert str(error.value).startswith(f"{file}:3: ") and says in str(error.value)


@pytest.mark.parametrize("text", ["", "\n\n", GOOD])
def test_too_few_rows_are_refused(tmp_path, text):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(JobError, match=r"d\.jsonl has [01] rows"):
        read_rows([str(tmp_path / "d.jsonl")])


def test_holding_out_all_rows_is_refused(tmp_path):
    rows = read_rows([str(make_data(tmp_path / "d.jsonl", 5))])
    with pytest.raises(JobError, match="5 rows, and 5 of them are held out"):
        rows.split(5)


def test_missing_file_is_refused():
    with pytest.raises(JobError, match="there is no file nowhere/d.jsonl"):
        read_rows(["nowhere/d.jsonl"])


def test_a_datasets_name_is_loaded_by_datasets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    make_data(tmp_path / "set" / "train.jsonl", 9)
    expected = read_rows([str(tmp_path / "set" / "train.jsonl")]).rows
    assert read_rows([str(tmp_path / "set")]).rows == expected
    with pytest.raises(JobError, match=r"row 0: the field 'text' \(--answer-field\) is missing"):
        read_rows([str(tmp_path / "set")], Fields("question", "text"))


def labelled(tokenizer, example):
    return tokenizer.decode([t for t in example["labels"] if t != IGNORED])


def test_only_the_answer_and_its_end_are_labels(tokenizer):
    (example,), remark = Encoder(tokenizer, 64).examples([("How many?", "Three.")], "training")
    assert labelled(tokenizer, example) == "Three.<eos>"
    assert tokenizer.decode(example["input_ids"]) == "How many?\nThree.<eos>"
    assert remark == []


def test_chat_template_is_used_and_the_end_is_learned_once(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    encoder = Encoder(tokenizer, 64)
    (example,), _ = encoder.examples([("How many?", "Three.")], "training")
    assert tokenizer.decode(example["input_ids"]) == "<user>How many?<eos>\n<assistant>Three.<eos>"
    assert labelled(tokenizer, example) == "Three.<eos>"
    assert example["input_ids"][: len(encoder.prompt("How many?"))] == encoder.prompt("How many?")


def beginning_with_its_end(tokenizer):
    """A tokenizer whose texts begin with the end token, as OPT's do."""
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    own = deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    return own


@pytest.mark.parametrize("begins", [False, True], ids=["plain", "begins with the end token"])
@pytest.mark.parametrize("text", ["some words", "one<eos>two", "ended<eos>"])
def test_a_text_and_an_answer_end_with_one_end_token_whatever_comes_before(tokenizer, begins, text):
    used = beginning_with_its_end(tokenizer) if begins else tokenizer
    start, whole = "<eos>" if begins else "", text.removesuffix("<eos>") + "<eos>"
    examples, _ = Encoder(used, 64).examples([text, ("asked", text)], "training")
    assert used.decode(examples[0]["input_ids"]) == start + whole
    assert used.decode(examples[1]["input_ids"]) == f"{start}asked\n{whole}"
    assert labelled(used, examples[1]) == whole


def test_long_rows_are_cut_and_those_without_room_left_out(tokenizer):
    pairs = [("ab", "c"), ("ab", "c" * 9), ("a" * 9, "c")]
    examples, remark = Encoder(tokenizer, 6).examples(pairs, "training")
    assert [len(e["input_ids"]) for e in examples] == [5, 6]
    assert "2 of the 3 training rows" in remark[0] and "1 of them left out" in remark[0]
    with pytest.raises(JobError, match="--max-length 3 leaves no room for an answer in any of the 3 training rows"):
        Encoder(tokenizer, 3).examples(pairs, "training")


def test_padding_neither_counts_nor_is_seen(tokenizer):
    encoder = Encoder(tokenizer, 64)
    examples, _ = encoder.examples([("a", "b"), ("aaa", "bbbb")], "training")
    batch = encoder.collate(examples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(e["input_ids"]) for e in examples]
    assert torch.equal(
        batch["labels"] != IGNORED, (batch["labels"] == batch["input_ids"]) & batch["attention_mask"].bool()
    )
    assert json.dumps(batch["input_ids"][1].tolist()) == json.dumps(examples[1]["input_ids"])
