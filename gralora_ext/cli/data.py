# SPDX-License-Identifier: Apache-2.0
"""Rows made into tokens and labels, and those into padded batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..program.errors import JobError, clipped, first_sentence
from .chat import Template, TemplateFails
from .rows import Completion, Messages, Row

IGNORED = -100  # the label that torch's cross entropy leaves out
Example = dict[str, list[int]]


class Sample(NamedTuple):
    """What the model is asked in a sample answer: its tokens, and the texts of the question and of the right answer."""

    tokens: list[int]
    prompt: str
    reference: str


class Encoder:
    """Makes tokens of rows: by the tokenizer's chat template where it has one, else the prompt, a line break, the answer.

    The last answer ends with the tokenizer's end token, so that the model learns where to stop. Answers and that token
    are the labels; all tokens are, where ``answers_only`` is off, and in texts.
    """

    def __init__(self, tokenizer: Any, max_length: int, answers_only: bool = True):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.answers_only = answers_only
        self.template = Template(tokenizer)
        self.place = self.template.place
        self.pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)

    def prompt(self, prompt: str) -> list[int]:
        """The tokens that the model sees before it answers."""
        if self.template.exists:
            return self._tokens(self.template.open([{"role": "user", "content": prompt}]), add_special_tokens=False)
        return self._open(prompt + "\n")

    def pieces(self, row: Row) -> tuple[list[tuple[list[int], bool]], int]:
        """The tokens of a row, in pieces that are learned or not; and how many answers the template does not keep as it opens them."""
        if isinstance(row, str):
            return [(self._ended(self._open(row)), True)], 0
        if isinstance(row, tuple):
            prompt, answer = row
            text, kept = self._answer(prompt, answer)
            said = self._tokens(text, add_special_tokens=False)
            return [(self.prompt(prompt), False), (self._ended(said), True)], int(not kept)
        if not self.template.exists:
            raise JobError(
                f"the rows are conversations, and the tokenizer in {self.place} has no chat template: name a model that "
                "has one, such as an Instruct model, or a file with --chat-template"
            )
        talk = _conversation(row)
        if not self.answers_only:
            text = self.template.text(talk.messages, talk.tools).rstrip()
            return [(self._ended(self._tokens(text, add_special_tokens=False)), True)], 0
        if self.template.has_marks and not talk.asked:
            tokens, learned = self.template.marked(talk.messages, talk.tools)
            end = max((i + 1 for i, mark in enumerate(learned) if mark), default=0)
            pieces = [([token], mark) for token, mark in zip(tokens[:end], learned, strict=False)]
            if 0 < end == len(tokens) and tokens[-1] not in self.tokenizer.all_special_ids:
                pieces[-1] = self._ended(pieces[-1][0]), True
            return pieces, 0
        texts, lost = self.template.parts(talk.messages, talk.asked, talk.tools)
        pieces = self._cut(texts)
        if pieces:
            pieces[-1] = self._ended(pieces[-1][0]), True
        return pieces, lost

    def examples(self, rows: list[Row], what: str) -> tuple[list[Example], list[str]]:
        """``input_ids`` and ``labels`` of each row, cut at the greatest length, and remarks on what did not fit.

        A row of which no label is left is left out; that all are is a JobError.
        """
        examples, cut, silent, unmarked, lost, bare = [], 0, True, 0, 0, 0
        for row, (pieces, not_told) in zip(rows, map(self._pieces_or_error, rows), strict=True):
            ids = [token for tokens, _ in pieces for token in tokens]
            labels = [t if said or not self.answers_only else IGNORED for tokens, said in pieces for t in tokens]
            labels[:1] = [IGNORED][: len(labels)]  # it is predicted from nothing, so that it does not count
            cut += len(ids) > self.max_length
            silent = silent and len(ids) < 2  # nothing, or the end token alone
            unmarked += not any(said for _, said in pieces)
            if isinstance(row, tuple):
                bare += not_told
            else:
                lost += not_told
            ids, labels = ids[: self.max_length], labels[: self.max_length]
            if any(label != IGNORED for label in labels):
                examples.append({"input_ids": ids, "labels": labels})
        if unmarked == len(rows):
            raise JobError(
                f"the chat template of the tokenizer in {self.place} does not tell what the assistant says in any of the "
                f"{len(rows)} {what} rows: give one with {{% generation %}} marks by --chat-template"
            )
        if silent:
            raise JobError(f"the tokenizer in {self.place} makes no token of any row: its files are damaged")
        if not examples:
            raise JobError(
                f"--max-length {self.max_length} leaves no room for an answer in any of the {len(rows)} {what} rows"
            )
        remarks = self._remarks(len(rows), what, cut, len(rows) - len(examples) - unmarked, unmarked, lost)
        if bare:
            remarks.append(
                f"{bare:,} answers in the {len(rows):,} {what} rows stand bare behind what the chat template opens an answer "
                "with, since it writes a finished one otherwise (--chat-template takes another template)"
            )
        tooled = sum(isinstance(row, Completion) and bool(row.tools) for row in rows)
        if tooled and not self.template.shows_tools:
            remarks.append(
                f"{tooled:,} of the {len(rows):,} {what} rows have tools, which the chat template does not show to the model"
            )
        return examples, remarks

    def _remarks(self, count: int, what: str, cut: int, left_out: int, unmarked: int, lost: int) -> list[str]:
        remarks = []
        if cut:
            whole = f", {left_out:,} of them left out whole" if left_out else ""
            remarks.append(
                f"{cut:,} of the {count:,} {what} rows are longer than --max-length {self.max_length}: cut{whole}"
            )
        if unmarked:
            remarks.append(
                f"{unmarked:,} of the {count:,} {what} rows have no answer that the template tells apart: left out"
            )
        if lost:
            remarks.append(
                f"{lost:,} answers in the {count:,} {what} rows are not learned: the chat template writes them otherwise "
                "when the conversation goes on (--chat-template takes one with {% generation %} marks)"
            )
        return remarks

    def sample(self, row: Row) -> Sample:
        """A held-out row's question with its right answer: of a conversation the last one, of a text its second half."""
        if isinstance(row, tuple):
            return Sample(self.prompt(row[0]), *row)
        if isinstance(row, str):
            words = row.split(" ")
            half = " ".join(words[: (len(words) + 1) // 2]) or row
            return Sample(self._open(half), half, row[len(half) :].strip())
        talk = _conversation(row)
        messages = talk.messages
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        asked = self.template.open(messages[:last], talk.tools) if last else ""
        shown = "\n".join(f"{message['role']}: {message.get('content', '')}" for message in messages[:last])
        return Sample(self._tokens(asked, add_special_tokens=False), shown, messages[last].get("content", ""))

    def collate(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """A batch ``[B, T]`` padded on the right: ``input_ids``, ``attention_mask``, ``labels``."""
        width = max(len(e["input_ids"]) for e in examples)

        def rows(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([e[key] + [fill] * (width - len(e[key])) for e in examples])

        lengths = torch.tensor([[len(e["input_ids"])] for e in examples])
        return {
            "input_ids": rows("input_ids", self.pad),
            "attention_mask": (torch.arange(width) < lengths).long(),
            "labels": rows("labels", IGNORED),
        }

    def _pieces_or_error(self, row: Row) -> tuple[list[tuple[list[int], bool]], int]:
        try:
            return self.pieces(row)
        except TemplateFails as error:
            cure = "mend it, or remove it, and rows are taken as plain text"
            if not isinstance(row, (str, tuple)):
                messages = _conversation(row).messages
                roles = clipped(", ".join(message["role"] for message in messages))
                said = clipped(repr(messages[0].get("content", "")))
                cure = f"mend it, or the conversation of {roles} that begins with {said}"
            raise JobError(f"the chat template of the tokenizer in {self.place} fails: {error}: {cure}") from error

    def _tokens(self, text: str, **how: Any) -> list[int]:
        try:
            return list(self.tokenizer(text, **how)["input_ids"])
        except Exception as error:  # tokenizers raises its own
            raise JobError(
                f"the tokenizer in {self.place} cannot read a row: {first_sentence(error)}: its files are damaged"
            ) from error

    def _cut(self, texts: list[tuple[str, bool]]) -> list[tuple[list[int], bool]]:
        """The tokens of the whole text, cut where its pieces meet.

        That can be done where the tokens up to there are the first tokens of the whole. Else one of them lies across, and
        each piece is read by itself, as the model meets it when it answers.
        """
        whole = self._tokens("".join(text for text, _ in texts), add_special_tokens=False)
        pieces, before, at = [], "", 0
        for text, said in texts:
            before += text
            tokens = self._tokens(before, add_special_tokens=False)
            if tokens != whole[: len(tokens)]:
                return [(self._tokens(text, add_special_tokens=False), said) for text, said in texts]
            pieces.append((whole[at : len(tokens)], said))
            at = len(tokens)
        return pieces

    def _open(self, text: str) -> list[int]:
        """The tokens of a text that goes on; some tokenizers close every text."""
        tokens = self._tokens(text)
        if tokens and tokens[-1] == self.tokenizer.eos_token_id:
            tokens.pop()
        return tokens

    def _ended(self, tokens: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]

    def _answer(self, prompt: str, answer: str) -> tuple[str, bool]:
        """The answer with what the template puts around it, and True; or by itself, and False.

        The latter where the template writes an answer that is there otherwise than it opens one that is to come.
        """
        if not self.template.exists:
            return answer, True
        asked = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        pieces, lost = self.template.parts(asked)
        return (answer, False) if lost else (pieces[-1][0], True)


def _conversation(row: Messages | Completion) -> Completion:
    return row if isinstance(row, Completion) else Completion(row, 0)
