# SPDX-License-Identifier: Apache-2.0
"""PTX text to kernels: parameters, registers, shared arrays and a list of instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .types import TYPES, unsigned

# Dynamic shared memory starts here or at a multiple of it, behind the static arrays.
SHARED_ALIGNMENT = 1024


@dataclass(frozen=True)
class Instruction:
    """``@!p mul.lo.s32 a, b, c``: opcode "mul", modifiers ("lo", "s32"), operands ["a", "b", "c"]."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str

    @property
    def type(self) -> str:
        """The last modifier, which is the type of most instructions' operands."""
        return self.modifiers[-1]


@dataclass(frozen=True)
class Parameter:
    name: str
    dtype: np.dtype
    count: int  # of a structure its bytes, else 1


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    registers: dict[str, np.dtype] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # arrays' offsets
    static_bytes: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)


def parse(text: str) -> dict[str, Kernel]:
    """All entry points by name."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    dynamic = re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", text)
    kernels = {}
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL):
        kernel = Kernel(entry[1], _parameters(entry[2]))
        for statement in _statements(text, entry.end()):
            _add(kernel, statement)
        kernel.static_bytes = _round_up(kernel.static_bytes, SHARED_ALIGNMENT)
        kernel.shared.update(dict.fromkeys(dynamic, kernel.static_bytes))
        kernels[kernel.name] = kernel
    return kernels


def split_operands(text: str) -> tuple[str, ...]:
    """``{a, b}, [c + 4], d`` at the commas outside of brackets."""
    parts = re.split(r",(?![^{\[]*[}\]])", text)
    return tuple(part.strip() for part in parts if part.strip())


def members(vector: str) -> tuple[str, ...]:
    """``{a, b}`` to a and b; a single operand to itself."""
    return split_operands(vector.strip("{}"))


def _parameters(text: str) -> list[Parameter]:
    declared = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", text)
    return [Parameter(name, TYPES[kind], int(count or 1)) for kind, name, count in declared]


def _statements(text: str, start: int) -> Iterator[str]:
    """From behind a body's opening brace to its end; braces within are scopes, which are taken as one."""
    depth = 1
    statement = ""
    for character in text[start:]:
        between = not statement.strip()
        if character == "{" and between:
            depth += 1
        elif character == "}" and between:
            depth -= 1
            if depth == 0:
                return
        elif character == ";":
            yield statement.strip()
            statement = ""
        elif character == ":" and re.fullmatch(r"\s*[$\w]+", statement):
            yield statement.strip() + ":"
            statement = ""
        else:
            statement += character


def _add(kernel: Kernel, statement: str) -> None:
    if statement.endswith(":"):
        kernel.labels[statement[:-1]] = len(kernel.code)
    elif statement.startswith(".reg"):
        _add_registers(kernel, statement)
    elif statement.startswith(".shared"):
        array = re.match(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", statement)
        offset = _round_up(kernel.static_bytes, int(array[1]))
        kernel.shared[array[3]] = offset
        kernel.static_bytes = offset + TYPES[array[2]].itemsize * int(array[4] or 1)
    elif statement.startswith(".pragma"):
        pass
    elif statement.startswith("."):
        raise NotImplementedError(statement)
    elif statement:
        parts = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL)
        opcode, *modifiers = parts[3].split(".")
        text = " ".join(statement.split())
        kernel.code.append(
            Instruction(opcode, tuple(modifiers), split_operands(parts[4]), parts[2], parts[1] == "!", text)
        )


def _add_registers(kernel: Kernel, statement: str) -> None:
    declaration = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL)
    dtype = unsigned(TYPES[declaration[1]])
    for name in declaration[2].split(","):
        register = re.match(r"\s*([%\w$]+)(?:<(\d+)>)?", name)
        names = [register[1]] if register[2] is None else [f"{register[1]}{i}" for i in range(int(register[2]))]
        kernel.registers.update(dict.fromkeys(names, dtype))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
