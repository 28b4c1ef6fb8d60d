# SPDX-License-Identifier: Apache-2.0
"""The messages of the errors that this project raises, read from its sources without running them.

A message is told by its texts: the literal parts between the values that are put into it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_CPP_CALL = re.compile(r"\b(TORCH_CHECK\w*|TORCH_WARN\w*)\s*\(|\bthrow\s+std::\w+\s*\(")
# The making of an exception, our warnings, and the functions that raise what they are told.
_RAISED = re.compile(r"Error$|^SystemExit$|^warn$|^_refuse_device$|^_refuse$|^_fail$")
_CPP_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Message:
    """One place that raises, and the literal parts of what it says; none where it passes words on."""

    file: str
    line: int
    texts: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The longest literal part, without the commands in it, by which the message is found in the documentation."""
        return max((text.split("`")[0] for text in self.texts), key=len, default="")

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {'…'.join(self.texts)}"


def messages() -> list[Message]:
    """Those of the package and of the C++ sources, in the order of files and lines."""
    sources = [ROOT / "setup.py", *sorted((ROOT / "gralora_ext").rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources}
    makers = _makers_of_text(trees.values())
    found = [message for path, tree in trees.items() for message in _of_python(path, tree, makers)]
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            found += _of_cpp(path)
    return found


def _of_python(path: Path, tree: ast.Module, makers: dict[str, list[str]]) -> Iterator[Message]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not _RAISED.search(_name(node.func)):
            continue
        texts = _clean([text for argument in node.args for text in _texts(argument)])
        if not texts:
            parts = [part for argument in node.args for part in ast.walk(argument)]
            texts = _clean([text for part in parts for text in makers.get(_name(getattr(part, "func", part)), [])])
        yield Message(str(path.relative_to(ROOT)), node.lineno, texts)


def _makers_of_text(trees: Iterable[ast.Module]) -> dict[str, list[str]]:
    """By its name, the literal parts of what a function returns or a constant holds: messages that are not made in place."""
    makers: dict[str, list[str]] = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef):
            values = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
            makers.setdefault(node.name, []).extend(text for value in values for text in _texts(value))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            makers.setdefault(node.targets[0].id, []).extend(_texts(node.value))
    return makers


def _texts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [text for value in node.values for text in _texts(value)]
    if isinstance(node, ast.BinOp):
        return _texts(node.left) + _texts(node.right)
    if isinstance(node, ast.IfExp):
        return _texts(node.body) + _texts(node.orelse)
    if isinstance(node, ast.List):
        return [text for element in node.elts for text in _texts(element)]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Constant)
    ):
        return [text for part in (node.func.value, *node.args) for text in _texts(part)]  # "…".join, "…".format
    return []


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _of_cpp(path: Path) -> Iterator[Message]:
    source = re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), path.read_text(encoding="utf-8"))
    for match in _CPP_CALL.finditer(source):
        call = _balanced(source, match.end() - 1)
        yield Message(
            str(path.relative_to(ROOT)), source.count("\n", 0, match.start()) + 1, _clean(_adjacent_strings(call))
        )


def _balanced(source: str, start: int) -> str:
    """The text from the bracket at ``start`` to the one that closes it; brackets in strings do not count."""
    depth, i = 0, start
    while i < len(source):
        if source[i] == '"':
            i = _CPP_STRING.match(source, i).end()  # type: ignore[union-attr]
            continue
        depth += {"(": 1, ")": -1}.get(source[i], 0)
        i += 1
        if depth == 0:
            break
    return source[start:i]


def _adjacent_strings(call: str) -> list[str]:
    """The string literals of ``call``; those with only white space between them are one, as in C++."""
    texts: list[str] = []
    end = None
    for match in _CPP_STRING.finditer(call):
        if end is not None and not call[end : match.start()].strip():
            texts[-1] += match[1]
        else:
            texts.append(match[1])
        end = match.end()
    return texts


def _clean(texts: list[str]) -> tuple[str, ...]:
    words = (" ".join(text.removeprefix("gralora_ext: ").split()) for text in texts)
    return tuple(text.strip(":,;'() ") for text in words if any(map(str.isalpha, text)))


if __name__ == "__main__":
    for message in messages():
        print(message)
