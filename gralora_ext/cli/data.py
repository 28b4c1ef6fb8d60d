# SPDX-License-Identifier: Apache-2.0
"""Rows made into tokens and labels, and those into padded batches."""

from __future__ import annotations

from typing import Any

import torch

from ..program.errors import JobError, first_sentence

IGNORED = -100  # the label that torch's cross entropy leaves out


class Encoder:
    """Makes tokens of rows: the tokenizer's chat template where it has one, else the prompt, a line break, the answer.

    The answer ends with the tokenizer's end token, so that the model learns where to stop; only the answer and that token
    are labels.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.place = getattr(tokenizer, "name_or_path", "")
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self.pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)

    def prompt(self, prompt: str) -> list[int]:
        """The tokens that the model sees before it answers."""
        if self.chat:
            return self._tokens(self._chat(prompt), add_special_tokens=False)
        tokens = self._tokens(prompt + "\n")
        if tokens and tokens[-1] == self.tokenizer.eos_token_id:
            tokens.pop()  # some tokenizers close every text
        return tokens

    def parts(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens of the prompt, and those of the answer with the end token."""
        end = self._tokens(self._answer(prompt, answer), add_special_tokens=False)
        eos = self.tokenizer.eos_token_id
        if eos is not None and eos not in end:
            end.append(eos)
        return self.prompt(prompt), end

    def examples(self, pairs: list[tuple[str, str]], what: str) -> tuple[list[dict[str, list[int]]], str]:
        """``input_ids`` and ``labels`` of each row, cut at the greatest length, and a remark on what did not fit.

        A row whose prompt alone fills the length is left out; that none is left is a JobError.
        """
        examples, cut, silent = [], 0, True
        for start, end in (self.parts(*pair) for pair in pairs):
            room = self.max_length - len(start)
            cut += room < len(end)
            silent = silent and not start and len(end) < 2  # nothing, or the end token alone
            # The first token of a row is predicted from nothing, so that it does not count.
            if room > 0 and len(end[:room]) > (not start):
                examples.append({"input_ids": start + end[:room], "labels": [IGNORED] * len(start) + end[:room]})
        if silent:
            raise JobError(f"the tokenizer in {self.place} makes no token of any row: its files are damaged")
        if not examples:
            raise JobError(
                f"--max-length {self.max_length} leaves no room for an answer in any of the {len(pairs)} {what} rows"
            )
        left_out = f", {len(pairs) - len(examples):,} of them left out whole" if len(examples) < len(pairs) else ""
        remark = (
            f"{cut:,} of the {len(pairs):,} {what} rows are longer than --max-length {self.max_length}: cut{left_out}"
        )
        return examples, remark if cut else ""

    def collate(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
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

    def _tokens(self, text: str, **how: Any) -> list[int]:
        try:
            return list(self.tokenizer(text, **how)["input_ids"])
        except Exception as error:  # tokenizers raises its own
            raise JobError(
                f"the tokenizer in {self.place} cannot read a row: {first_sentence(error)}: its files are damaged"
            ) from error

    def _chat(self, prompt: str, answer: str | None = None) -> str:
        messages = [{"role": "user", "content": prompt}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
        except Exception as error:  # a template is a program: it raises what it likes
            raise JobError(
                f"the chat template of the tokenizer in {self.place} fails: {first_sentence(error)}: mend it, or remove "
                "it, and rows are taken as plain text"
            ) from error
        return text

    def _answer(self, prompt: str, answer: str) -> str:
        if self.chat:
            start, whole = self._chat(prompt), self._chat(prompt, answer)
            if whole.startswith(start):
                return whole[
                    len(start) :
                ].rstrip()  # what a template puts after its end token is not the model's to say
        return answer
