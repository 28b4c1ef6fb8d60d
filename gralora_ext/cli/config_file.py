# SPDX-License-Identifier: Apache-2.0
"""The file of ``--config``: YAML or JSON with the options' names, made into words of a command line."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from ..program.errors import JobError, clipped, first_sentence


def with_file(parser: Any, argv: list[str], file: Path) -> argparse.Namespace:
    """Puts the file's options before those of the command line, so that argparse checks both in one way."""
    words = _words(parser, file)
    try:
        chosen = parser.parse_args(words)
    except JobError as error:
        raise JobError(f"{_place(file, str(error))}: {error}") from None
    options = parser.parse_args(words + argv)
    # The other length of the job, given in the file, yields to the one on the command line.
    given = parser.parse_args(argv)
    if given.steps is not None and chosen.epochs is not None:
        options.epochs = given.epochs
    elif given.epochs is not None and chosen.steps is not None:
        options.steps = given.steps
    return options


def _words(parser: Any, file: Path) -> list[str]:
    values = _read(file)
    known = {name for name in vars(parser.parse_args([])) if name not in ("config", "debug")}
    words: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            hint = parser.nearest(name) or f"; the options are {', '.join(sorted(known))}"
            raise JobError(f"{_place(file, str(key))}: unknown option '{clipped(str(key))}'{hint}")
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, list) and not any(isinstance(v, (list, dict)) for v in value):
            words += [option, *map(str, value)]
        elif isinstance(value, (list, dict)):
            raise JobError(f"{_place(file, str(key))}: the option '{key}' is a single value, not a group")
        elif value is not None:
            words.append(f"{option}={value}")
    return words


def _read(file: Path) -> dict[str, Any]:
    kind = file.suffix.lower()
    if kind not in (".json", ".yaml", ".yml"):
        raise JobError(f"--config: {file} must end in .yaml, .yml or .json")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise JobError(f"--config: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise JobError(f"--config: {file} is not UTF-8 text") from None
    try:
        values = json.loads(text) if kind == ".json" else _yaml(file, text)
    except json.JSONDecodeError as error:
        raise JobError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise JobError(f"{file}: nested too deeply for a file of options") from None
    except ValueError as error:  # a number of thousands of digits, a date that there is not
        raise JobError(f"{file}: a value that cannot be read: {first_sentence(error).split(';')[0]}") from None
    if not isinstance(values, dict):
        raise JobError(f"{file}: expected names and values, got {type(values).__name__}")
    return values


def _yaml(file: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise JobError("a YAML --config needs `pip install pyyaml`; JSON works without") from None
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise JobError(f"{place}: not YAML: {getattr(error, 'problem', None) or first_sentence(error)}") from None


def _place(file: Path, message: str) -> str:
    """``file:line`` of the first key that ``message`` names, else ``file``."""
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, 1):
        key = re.match(r"""[\s{,]*["']?([\w-]+)["']?\s*:""", line)
        if key and re.search(rf"(?<![\w-])(--)?{re.escape(key[1]).replace('_', '[-_]')}(?![\w-])", message):
            return f"{file}:{number}"
    return str(file)
