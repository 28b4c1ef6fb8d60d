# SPDX-License-Identifier: Apache-2.0
"""Conversations as the tokenizer's chat template writes them, and which parts of that the assistant said."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..program.errors import JobError, first_sentence
from .rows import Messages

Tools = Sequence[dict[str, Any]]
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class TemplateFails(Exception):
    """What the template, or the library that runs it, says is wrong."""


class Template:
    """The chat template of ``tokenizer``; ``exists`` says whether it has one."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.place = getattr(tokenizer, "name_or_path", "")
        template = getattr(tokenizer, "chat_template", None)
        self.exists = bool(template)
        texts = list(template.values()) if isinstance(template, dict) else [template or ""]
        self.shows_tools = any(re.search(r"\btools\b", text) for text in texts)
        self.has_marks = bool(_MARKS.search(template["default"] if isinstance(template, dict) else template or ""))

    def text(self, messages: Messages, tools: Tools = (), **how: Any) -> Any:
        """What the template makes of ``messages``: text, or what ``how`` asks ``apply_chat_template`` for.

        The arguments of calls are objects for most templates. Those of some models, such as DeepSeek-V3, fail with them
        and take their text.
        """
        how = {"tokenize": False, **({"tools": tools} if tools else {}), **how}
        try:
            return self.tokenizer.apply_chat_template(messages, **how)
        except Exception as error:  # a template is a program: it raises what it likes
            in_text = _with_arguments_in_text(messages)
            if in_text != messages:
                with suppress(Exception):  # what was wrong the first time is told
                    return self.tokenizer.apply_chat_template(in_text, **how)
            raise TemplateFails(first_sentence(error)) from error

    def open(self, messages: Messages, tools: Tools = ()) -> str:
        """The text after which the assistant speaks."""
        return self.text(messages, tools, add_generation_prompt=True)

    def parts(self, messages: Messages, asked: int = 0, tools: Tools = ()) -> tuple[list[tuple[str, bool]], int]:
        """Pieces of the conversation's text in their order, each with whether the assistant said it.

        What it said within the first ``asked`` messages does not count. The pieces end with the assistant's last word.
        A turn is found by writing the conversation to its beginning and to its end: both must be beginnings of the whole
        text. The second value is the number of turns of which that is not true, since the template writes them otherwise
        when the conversation goes on: they are not among what the assistant said.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= asked]
        whole = self.text(messages[: turns[-1] + 1], tools)
        pieces, at, lost = [], 0, 0
        for i in turns:
            start = self.open(messages[:i], tools) if i else None  # what opens the first message is not known
            end = whole if i == turns[-1] else self.text(messages[: i + 1], tools)
            if start is None or not (whole.startswith(end) and end.startswith(start) and at <= len(start)):
                lost += 1
                continue
            said = end[len(start) :].rstrip()  # what a template puts after its end token is not the model's to say
            pieces += [(whole[at : len(start)], False), (said, True)]
            at = len(start) + len(said)
        return pieces, lost

    def marked(self, messages: Messages, tools: Tools = ()) -> tuple[list[int], list[bool]]:
        """The conversation's tokens, and which of them the template's own ``{% generation %}`` marks say are learned.

        So is an end token that the template writes right behind a mark.
        """
        made = self.text(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        tokens, marks = list(made["input_ids"]), [bool(mark) for mark in made["assistant_masks"]]
        before = zip([False, *marks], tokens, strict=False)  # of each token, whether the one before it is marked
        ends = [marked and token == self.tokenizer.eos_token_id for marked, token in before]
        return tokens, [mark or end for mark, end in zip(marks, ends, strict=True)]


def _with_arguments_in_text(value: Any) -> Any:
    """``value`` with the JSON text of each object that is called ``arguments`` in its place."""
    if isinstance(value, list):
        return [_with_arguments_in_text(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        name: json.dumps(part, ensure_ascii=False, default=str)
        if name == "arguments" and isinstance(part, dict)
        else _with_arguments_in_text(part)
        for name, part in value.items()
    }


def read_template(file: str) -> str:
    """The text of ``file``, which must be a Jinja template."""
    import jinja2

    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
        # With the blocks that transformers adds.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", _without_ends(text)))
    except OSError as error:
        raise JobError(f"--chat-template: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise JobError(f"--chat-template: {file} is not UTF-8 text") from None
    except jinja2.TemplateSyntaxError as error:
        raise JobError(f"--chat-template: {file}:{error.lineno}: {first_sentence(error)}") from None
    if not text.strip():
        raise JobError(f"--chat-template: {file} is empty")
    return text


def _without_ends(text: str) -> str:
    return re.sub(r"\{%[-+]?\s*endgeneration\s*[-+]?%\}", "", text)
