# SPDX-License-Identifier: Apache-2.0
"""The file of ``--config``: YAML or JSON with the options' names, read as the command line is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..program.errors import JobError, clipped, first_sentence
from .option_table import OPTIONS
from .parser import HOW, JobParser, own_name


def values(parser: JobParser, file: Path) -> dict[str, Any]:
    """The options that ``file`` gives, under our own names. One that is null is not given."""
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in _read(file).items():
        name = (own_name(key) or "").replace("-", "_")
        if name not in OPTIONS:
            raise JobError(f"{_place(file, key)}: {_unknown(parser, key, name)}")
        if name in names:
            raise JobError(f"{_place(file, key)}: '{names[name]}' and '{clipped(key)}' are the same option")
        names[name] = key
        if value is None:
            continue
        try:
            found[name] = OPTIONS[name].kind.of_file(value)
        except TypeError as error:
            raise JobError(f"{_place(file, key)}: the option '{key}' {error}") from None
        except ValueError as error:
            raise JobError(f"{_place(file, key)}: argument {_as_known(key, name)}: {error}") from None
    return found


def _unknown(parser: JobParser, key: str, name: str) -> str:
    if name in HOW:
        return f"the option '{key}' belongs on the command line"
    hint = parser.nearest(key) or f"; `gralora-ext finetune --help` lists the {len(OPTIONS)} options"
    return f"unknown option '{clipped(key)}'{hint}"


def _as_known(key: str, name: str) -> str:
    own = f"--{OPTIONS[name].name}"
    return own if key.replace("_", "-") == OPTIONS[name].name else f"{key} (here {own})"


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
        content = json.loads(text, object_pairs_hook=_once) if kind == ".json" else _yaml(file, text)
    except json.JSONDecodeError as error:
        raise JobError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise JobError(f"{file}: nested too deeply for a file of options") from None
    except _Twice as error:
        raise JobError(f"{file}: '{clipped(str(error))}' is given twice") from None
    except ValueError as error:  # a number of thousands of digits, a date that there is not
        raise JobError(f"{file}: a value that cannot be read: {first_sentence(error).split(';')[0]}") from None
    if not isinstance(content, dict):
        raise JobError(f"{file}: expected names and values, got {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


class _Twice(Exception):
    """A name that stands twice among those of one group."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return content


def _yaml(file: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise JobError("a YAML --config needs `pip install pyyaml`; JSON works without") from None

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _once([(str(key.value), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise JobError(f"{place}: not YAML: {getattr(error, 'problem', None) or first_sentence(error)}") from None


def _place(file: Path, key: str) -> str:
    """``file:line`` where the line begins with ``key``, else ``file``."""
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        found = re.match(r"""[\s{,]*["']?([^"':]+?)["']?\s*:""", line)
        if found and found[1] == key:
            return f"{file}:{number}"
    return str(file)
