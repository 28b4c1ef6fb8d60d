# SPDX-License-Identifier: Apache-2.0
"""Rows in which the assistant calls tools: their definitions, and the arguments of the calls."""

from __future__ import annotations

import json

import pytest
from rows_helpers import write

from gralora_ext.cli.rows import Completion, Rows, read_rows
from gralora_ext.compare.texts import Texts, _named
from gralora_ext.program.errors import JobError

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def called(arguments, **more):
    """A conversation with one call of a tool."""
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}, **more}
    return [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]


def test_calls_in_a_columnar_file_have_only_the_arguments_that_they_were_given(tmp_path):
    """Such a file gives all calls the arguments of each: those that a call had not are None."""
    pytest.importorskip("pyarrow")
    talks = [
        called({"city": "Rome", "at": {"day": 1}}),
        called({"count": 0, "at": {"hour": 2}, "all": [{"a": 1}, {"b": 2}]}),
    ]
    assert read_rows([write(tmp_path / "d.parquet", [{"messages": talk} for talk in talks])]).rows == talks


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"city": "Rome", "day": null}', {"city": "Rome", "day": None}),
        ("{}", {}),
        ("Rome", "Rome"),
        ('"Rome"', '"Rome"'),
        ("[" * 100_000, "[" * 100_000),
    ],
    ids=["object", "empty object", "no JSON", "a JSON string", "nested too deeply"],
)
def test_arguments_that_are_the_text_of_an_object_are_that_object(tmp_path, written, read):
    """OpenAI writes them so, and templates turn them into JSON themselves."""
    flat = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": written}]}]
    file = write(tmp_path / "d.jsonl", [{"messages": called(written, id="1")}, {"messages": flat}])
    assert read_rows([file]).rows == [
        called(read, id="1"),
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": read}]}],
    ]


@pytest.mark.parametrize("given", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
def test_a_conversation_has_the_tools_of_its_row(tmp_path, given):
    """As a list, or as TRL takes them too, the JSON text of one."""
    talk = called({"city": "Rome"})
    rows = [
        {"messages": talk, "tools": given},
        {"messages": talk, "tools": []},
        {"messages": talk, "tools": None},
        {"messages": talk, "tools": ""},
        {"messages": talk},
    ]
    file = write(tmp_path / "d.jsonl", rows)
    assert read_rows([file]).rows == [Completion(talk, 0, [TOOL]), talk, talk, talk, talk]
    file = write(tmp_path / "p.jsonl", [{"prompt": talk[:1], "completion": talk[1:], "tools": given}] * 2)
    assert read_rows([file]).rows == [Completion(talk, 1, [TOOL])] * 2
    for row in (Completion(talk, 0, [TOOL]), Completion(talk, 1, [TOOL])):
        assert read_rows([write(tmp_path / "c.jsonl", [_named(row)] * 2)]).rows == [row, row]


@pytest.mark.parametrize("given", [7, {"f": 1}, ["f"], "f, g", '{"f": 1}'])
def test_tools_that_are_no_list_of_objects_are_refused(tmp_path, given):
    file = write(tmp_path / "d.jsonl", [{"messages": called({}), "tools": given}] * 2)
    with pytest.raises(
        JobError, match=r"d.jsonl:1: the field 'tools' must be a list of objects, or its JSON text, got "
    ):
        read_rows([file])


def test_digests_of_rows_without_tools_stay_those_of_older_jobs_and_tools_count():
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert Rows("x", [talk]).digest.startswith("b9a4f8657441fbd8")
    assert Rows("x", [Completion(talk, 1)]).digest.startswith("48dcfe4e9ecdaa66")
    rows = [talk, Completion(talk, 0), Completion(talk, 0, [TOOL]), Completion(talk, 0, [{**TOOL, "strict": True}])]
    assert len({Rows("x", [row]).digest for row in rows}) == 4
    assert len({Texts("x", "y", [], [], [row], []).digest("measure") for row in rows}) == 4
