# SPDX-License-Identifier: Apache-2.0
"""Data as it comes: formats of files, fields of rows, several files, sets of `datasets`; what is held out, dropped and counted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from cli_helpers import call, conversations, environment, make_data, make_model, metrics, sentence
from rows_helpers import write

from gralora_ext.cli import row_files
from gralora_ext.cli.gather import gather
from gralora_ext.cli.options import parse
from gralora_ext.cli.rows import Completion, Fields, Rows, read_rows
from gralora_ext.compare.texts import _named
from gralora_ext.program.errors import JobError

ROWS = [{"question": f'"q" {i},\nof two lines, é', "answer": f"a{i}"} for i in range(5)]
PAIRS = [(row["question"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "data"])
def test_every_kind_of_file_has_the_same_rows(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    assert read_rows([write(tmp_path / f"d.{kind}", ROWS)]).rows == PAIRS


def test_a_json_file_may_have_a_row_in_each_line(tmp_path):
    (tmp_path / "d.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert read_rows([str(tmp_path / "d.json")]).rows == PAIRS


def test_several_files_are_read_one_after_the_other(tmp_path):
    files = [write(tmp_path / "1.jsonl", ROWS[:2]), write(tmp_path / "2.csv", ROWS[2:])]
    found = read_rows(files)
    assert found.rows == PAIRS and found.name == f"{files[0]} and 1 more"


@pytest.mark.parametrize("saved", [False, True])
def test_a_folder_is_read_by_datasets(tmp_path, saved):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    if saved:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "set"))
    else:
        write(tmp_path / "set" / "train.jsonl", ROWS)
    assert read_rows([str(tmp_path / "set")]).rows == PAIRS


def test_conversations_of_a_columnar_file_lose_what_is_empty(tmp_path):
    pytest.importorskip("pyarrow")
    talks = conversations(3)
    rows = [{"messages": messages} for messages in talks]
    rows[0]["messages"][0]["name"] = "ann"  # the others then have a name that is None
    assert read_rows([write(tmp_path / "d.parquet", rows)]).rows == talks


ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
SAID = [{"role": "assistant", "content": "a"}]
FORMATS = {
    "prompt and completion": ({"prompt": "p", "completion": "c", "more": 1}, ("p", "c")),
    "a prompt and a completion of messages": (
        {"prompt": ASKED, "completion": SAID},
        Completion([*ASKED, *SAID], 2),
    ),
    "instruction and output": ({"instruction": "p", "input": "", "output": "c"}, ("p", "c")),
    "instruction, input and output": ({"instruction": "p", "input": "i", "output": "c"}, ("p\n\ni", "c")),
    "instruction and response": ({"instruction": "p", "response": "c"}, ("p", "c")),
    "text": ({"text": "some text", "id": "x"}, "some text"),
    "question and answer come first": ({"question": "q", "answer": "a", "text": "t", "messages": []}, ("q", "a")),
    "messages come before prompt": (
        {"prompt": "p", "completion": "c", "messages": [{"role": "assistant", "content": "a"}]},
        [{"role": "assistant", "content": "a"}],
    ),
    "ShareGPT's words": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    ),
    "a call of a tool": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "weight": 0}]},
        [{"role": "assistant", "tool_calls": [{"name": "f"}]}],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_fields_of_the_first_row_tell_the_format(tmp_path, name):
    row, expected = FORMATS[name]
    assert read_rows([write(tmp_path / "d.jsonl", [row, row])]).rows == [expected, expected]


@pytest.mark.parametrize("row", [("q", "a"), "t", [*ASKED, *SAID], Completion([*ASKED, *SAID], 2)], ids=type)
def test_rows_that_compare_writes_are_read_as_they_were(tmp_path, row):
    assert read_rows([write(tmp_path / "d.jsonl", [_named(row)] * 2)]).rows == [row, row]


def test_named_fields_are_taken_whatever_else_a_row_has(tmp_path):
    row = {"question": "q", "answer": "a", "text": "t", "talk": [{"role": "assistant", "content": "a"}]}
    file = write(tmp_path / "d.jsonl", [row, row])
    assert read_rows([file], Fields(text="text")).rows[0] == "t"
    assert read_rows([file], Fields(messages="talk")).rows[0] == row["talk"]
    assert read_rows([file], Fields("text", "question")).rows[0] == ("t", "q")


def test_what_there_is_nothing_to_learn_from_is_counted(tmp_path):
    texts = [{"text": text} for text in ("one", "", " \n", "two", None, "three")]
    found = read_rows([write(tmp_path / "d.jsonl", texts)])
    assert found.rows == ["one", "two", "three"] and found.remark == "3 of 6 texts are empty: left out"
    talks = [{"messages": messages} for messages in conversations(3)]
    talks.append({"messages": [{"role": "user", "content": "hello?"}]})
    found = read_rows([write(tmp_path / "c.jsonl", talks)])
    assert len(found.rows) == 3
    assert found.remark == "1 of 4 conversations have no answer of the assistant: left out"
    completions = [{"prompt": ASKED, "completion": said} for said in (SAID, SAID, ASKED)]
    found = read_rows([write(tmp_path / "p.jsonl", completions)])
    assert found.rows == [Completion([*ASKED, *SAID], 2)] * 2
    assert found.remark == "1 of 3 conversations have no answer of the assistant: left out"
    with pytest.raises(JobError, match="has 0 rows that are not empty: one to train on and one to hold out are the"):
        read_rows([write(tmp_path / "e.jsonl", [{"text": ""}] * 4)])


GOOD = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("d.json", '[{"question": "q", "answer": "a"},\n {"question": 7}]', "d.json:2: the field 'question'"),
        ("d.json", '[\n{"question": "q",\n "answer": }]', "d.json:3: not a JSON object: Expecting value at column 12"),
        ("d.json", '[{"question": "q", "answer": "a"}\n\n{}]', "d.json:3: not JSON: expected a comma or a bracket"),
        ("d.json", '[{"question": "q", "answer": "a"}', "d.json:1: not JSON: expected a comma or a bracket"),
        ("d.json", '[{"question": "q", "answer": "a"},]', "d.json:1: not a JSON object: Expecting value"),
        (
            "d.json",
            '[{"question": "q", "answer": "a"}]\n]',
            "d.json:1: not JSON: something follows the end of the list",
        ),
        ("d.json", "[1]", "d.json:1: expected a JSON object, got int"),
        ("d.json", "[]", "d.json has 0 rows"),
        ("d.json", '{\n "question": "q"}', "d.json:1: not a JSON object"),
        ("d.json", "[" * 100_000, "d.json:1: not a JSON object: nested too deeply"),
        ("d.csv", "question,answer\nq,a\nq\n", "d.csv:3: expected 2 columns, as the first line has, got 1"),
        ("d.csv", 'question,answer\nq,"a\nb"\nq,a,b\n', "d.csv:4: expected 2 columns, as the first line has, got 3"),
        ("d.csv", 'question,answer\nq,"a"b\n', "d.csv:2: not CSV: "),
        ("d.csv", 'question,answer\nq,"a\n', "d.csv:2: not CSV: unexpected end of data"),
        (
            "d.csv",
            "question,question\nq,a\n",
            "d.csv:1: two columns have the same name; the columns are question, quest",
        ),
        ("d.csv", "question,answer\nq,\n", "d.csv:2: the field 'answer' (--answer-field) must be a text, got an empty"),
        ("d.csv", "q,a\n1,2\n", "d.csv:2: the field 'question' (--prompt-field) is missing; the row has 'q', 'a'"),
        ("d.csv", "question,answer\n", "d.csv has 0 rows"),
        ("d.csv", b"question,answer\n\xff,a\n", "d.csv: not UTF-8 text"),
        ("d.parquet", b"PAR1 and no more", "d.parquet cannot be read as a Parquet file: "),
        ("d.jsonl", GOOD + '\n{"messages": "hi"}', "d.jsonl:2: the field 'messages' (--messages-field) must be a list"),
        ("d.jsonl", GOOD + '\n{"messages": []}', "must be a list of messages, got an empty list"),
        ("d.jsonl", GOOD + '\n{"text": "t"}', "d.jsonl:2: the field 'messages' (--messages-field) is missing"),
        ("d.jsonl", GOOD + '\n{"messages": ["hi"]}', "d.jsonl:2: message 0 of the field 'messages' must be an object"),
        (
            "d.jsonl",
            '{"messages": [{"content": "x"}]}',
            "must have a role, such as user or assistant; it has 'content'",
        ),
        ("d.jsonl", '{"messages": [{"role": 1, "content": "x"}]}', "must have a role, such as user or assistant"),
        ("d.jsonl", '{"messages": [{"role": "user"}]}', "must have a content; it has 'role'"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": ["x"]}]}', "its content must be a text, got list"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": "\\ud800"}]}', "has half of a surrogate pair"),
        ("d.jsonl", '{"text": 7}', "d.jsonl:1: the field 'text' (--text-field) must be a text, got int"),
        (
            "d.jsonl",
            '{"prompt": ["x"], "completion": "c"}',
            "the field 'prompt' (--prompt-field) must be a text, got list",
        ),
        (
            "d.jsonl",
            '{"prompt": ["x"], "completion": [{"role": "assistant", "content": "a"}]}',
            "d.jsonl:1: message 0 of the field 'prompt' must be an object with role and content, got str",
        ),
        (
            "d.jsonl",
            '{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant"}]}',
            "d.jsonl:1: message 0 of the field 'completion' must have a content; it has 'role'",
        ),
        (
            "d.jsonl",
            json.dumps({"prompt": ASKED, "completion": SAID}) + '\n{"prompt": "q", "completion": "a"}',
            "d.jsonl:2: the field 'prompt' (--prompt-field) must be a list of messages, got str",
        ),
    ],
)
def test_bad_row_is_named_with_its_place_and_field(tmp_path, name, text, says):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(JobError) as error:
        read_rows([str(tmp_path / name)])
    assert says in str(error.value) and str(tmp_path) in str(error.value) and len(str(error.value)) < 400


def test_bad_row_of_a_parquet_file_has_its_number(tmp_path):
    pytest.importorskip("pyarrow")
    rows = [*ROWS[:3], {"question": "", "answer": "a"}]
    with pytest.raises(JobError, match=r"d\.parquet, row 3: the field 'question' \(--prompt-field\) must be a text"):
        read_rows([write(tmp_path / "d.parquet", rows)])


def test_parquet_without_pyarrow_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "d.parquet").write_bytes(b"x")
    monkeypatch.setattr(row_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"d\.parquet is a Parquet file, and reading those needs `pip install pyarrow`"):
        read_rows([str(tmp_path / "d.parquet")])
    with pytest.raises(JobError, match="a dataset's name needs `pip install datasets`"):
        read_rows(["some/name"])


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_held_out_rows_are_drawn_by_the_seed(seed):
    rows = Rows("x", [str(i) for i in range(100)])
    train, held_out = rows.split(20, seed)
    assert len(held_out) == 20 and sorted(train + held_out) == sorted(rows.rows)
    assert train == [row for row in rows.rows if row in train] and held_out != rows.rows[-20:]
    assert rows.split(20, seed) == (train, held_out) != rows.split(20, seed + 1)


def test_rows_of_ones_own_are_held_out_at_random_and_gsm8ks_last(tmp_path):
    file = write(tmp_path / "d.jsonl", [{"text": f"row {i}"} for i in range(100)])
    drawn, last = (gather(parse(["--data", file, *more])) for more in ([], ["--held-out-from", "end"]))
    assert "20 held out, drawn by --seed 0" in drawn.said[0] and "80 texts to train on" in drawn.said[0]
    assert last.held_out == [f"row {i}" for i in range(80, 100)]
    assert drawn.digest == last.digest
    assert parse([]).held_out_from == "end"


@pytest.mark.parametrize("more", [[], ["--eval-data", "e.jsonl"]], ids=["drawn", "given"])
def test_an_evaluation_reads_rows_of_the_whole_that_is_held_out(tmp_path, monkeypatch, more):
    """A file may be sorted, and there may be several."""
    monkeypatch.chdir(tmp_path)
    for name, start in (("d", 0), ("e", 2000)):
        write(tmp_path / f"{name}.jsonl", [{"text": f"row {i:04}"} for i in range(start, start + 1000)])
    job = ["--data", "d.jsonl", *more, "--eval-rows", "16"]
    numbers = [int(row.split()[1]) % 1000 for row in gather(parse(job)).held_out]
    assert len(numbers) == 16 and numbers == sorted(set(numbers))
    quarters = [sum(start <= n < start + 250 for n in numbers) for start in range(0, 1000, 250)]
    assert all(2 <= count <= 6 for count in quarters), quarters
    first = gather(parse([*job, "--eval-rows-from", "start"])).held_out
    every = gather(parse([*job, "--eval-rows", "1000"])).held_out
    assert first == every[:16] and len(every) == (1000 if more else 200)
    assert parse([]).eval_rows_from == "start"


def test_rows_to_hold_out_may_be_files_of_their_own(tmp_path):
    train = write(tmp_path / "d.jsonl", ROWS[:1])
    other = write(tmp_path / "e.jsonl", ROWS[1:])
    found = gather(parse(["--data", train, "--eval-data", other]))
    assert (found.train, found.held_out) == (PAIRS[:1], PAIRS[1:])
    third = write(tmp_path / "f.jsonl", ROWS[2:])
    assert found.digest != gather(parse(["--data", train, "--eval-data", third])).digest
    with pytest.raises(JobError, match="--eval-data: there is no file nowhere.csv"):
        gather(parse(["--data", train, "--eval-data", "nowhere.csv"]))


def test_rows_to_hold_out_may_be_another_split_of_the_same_data(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", ROWS[:3])
    write(tmp_path / "set" / "test.jsonl", ROWS[3:])
    both = ["--data", str(tmp_path / "set"), "--eval-data", str(tmp_path / "set")]
    found = gather(parse([*both, "--eval-split", "test"]))
    assert (found.train, found.held_out) == (PAIRS[:3], PAIRS[3:])
    found = gather(parse([*both, "--split", "test", "--eval-split", "train"]))
    assert (found.train, found.held_out) == (PAIRS[3:], PAIRS[:3])
    with pytest.raises(
        JobError, match="set has the same rows as the training data: .*, or another split by --eval-split"
    ):
        gather(parse(both))


def test_rows_to_hold_out_that_are_those_to_train_on_are_refused(tmp_path):
    train, copy = (write(tmp_path / name, ROWS) for name in ("d.jsonl", "e.csv"))
    for other in (train, copy):
        with pytest.raises(JobError, match="--eval-data: .* has the same rows as the training data: name other rows"):
            gather(parse(["--data", train, "--eval-data", other]))


def test_held_out_rows_that_are_trained_on_too_are_counted(tmp_path):
    train = write(tmp_path / "d.jsonl", ROWS)
    other = write(tmp_path / "e.jsonl", [*ROWS[:2], {"question": "new?", "answer": "yes"}])
    assert (
        "2 of the 3 held-out rows are among those to train on"
        in gather(parse(["--data", train, "--eval-data", other])).said[-1]
    )
    doubled = write(tmp_path / "f.jsonl", [{"text": f"row {i % 10}"} for i in range(20)])
    found = gather(parse(["--data", doubled, "--held-out", "4", "--held-out-from", "end"]))
    assert found.said[-1].startswith("4 of the 4 held-out rows")
    assert not any("among those" in line for line in gather(parse(["--data", train])).said)


def test_job_on_plain_texts_learns_all_of_them(tmp_path):
    make_model(tmp_path / "model")
    write(tmp_path / "d.csv", [{"text": f"{i} cats and {i} dogs"} for i in range(20)])
    job = ("finetune", "--model", "model", "--data", "d.csv", "--steps", 6, "--lr", 0.02, "--max-length", 64)
    done = call(*job, "--sample-tokens", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = metrics(tmp_path / "runs" / "model-d")
    assert values["eval_loss_fall"] > 0
    assert values["samples"][0]["prompt"].endswith(" and") and values["samples"][0]["reference"].endswith(" dogs")


def test_checkpoint_of_before_there_was_a_choice_goes_on_with_the_last_rows_held_out(tmp_path):
    from gralora_ext.cli.checkpoints import MANIFEST, Checkpoints

    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl")
    job = (
        "finetune",
        "--model",
        "model",
        "--data",
        "data.jsonl",
        "--max-length",
        64,
        "--sample-tokens",
        2,
        "--no-merge",
    )
    job += ("--output", "out")
    assert call(*job, "--steps", 1, "--held-out-from", "end", cwd=tmp_path).returncode == 0
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-1"
    state = json.loads((checkpoint / "gralora_ext.json").read_text())
    new = (
        "held_out_from",
        "eval_rows_from",
        "weight_decay",
        "optim",
        "packing",
        "bf16",
        "init_weights",
        "answers_only",
        "adam_beta1",
    )
    for name in new:
        del state["settings"][name]
    (checkpoint / "gralora_ext.json").write_text(json.dumps(state))
    (checkpoint / MANIFEST).unlink()
    Checkpoints(checkpoint.parent, print).seal(checkpoint)
    refused = call(*job, "--steps", 2, "--resume", cwd=tmp_path)
    assert refused.returncode == 2
    said = "was made with --eval-rows-from start (now all), --held-out-from end (now random); go on with `"
    assert said in sentence(refused)
    more = ("--resume", "--eval-rows-from", "start", "--held-out-from", "end")
    assert sentence(refused).split("`")[1].endswith(" ".join(more))
    done = call(*job, "--steps", 2, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 steps done" in done.stdout


READ = """
import sys
sys.argv[0] = "gralora-ext"
from gralora_ext.cli.rows import read_rows
print(len(read_rows(["d.csv"]).rows), "torch" in sys.modules)
"""


def test_reading_needs_no_torch(tmp_path):
    write(tmp_path / "d.csv", ROWS)
    command = [sys.executable, "-c", READ]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert result.stdout == "5 False\n"


def test_an_input_of_blanks_beside_an_instruction_is_none(tmp_path):
    rows = [{"instruction": f"say {i}", "input": blank, "output": "x"} for i, blank in enumerate((" ", "", None, "it"))]
    found = read_rows([write(tmp_path / "d.jsonl", rows)], Fields())
    assert [row[0] for row in found.rows] == ["say 0", "say 1", "say 2", "say 3\n\nit"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--data-split", "train[:10]"], "--data-split: the rows are those of files"),
        (["--data-config", "main"], "--data-config: the rows are those of files"),
        (["--eval-data", "e.jsonl", "--eval-split", "test"], "--eval-split: the rows are those of files"),
    ],
)
def test_a_part_of_a_file_cannot_be_asked_for(tmp_path, monkeypatch, more, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", ROWS[:2])
    write(tmp_path / "e.jsonl", ROWS[2:])
    with pytest.raises(JobError, match=says):
        gather(parse(["--data", "d.jsonl", *more]))
    gather(parse(["--data", "d.jsonl", "--data-split", "train"]))
