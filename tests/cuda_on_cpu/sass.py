# SPDX-License-Identifier: Apache-2.0
"""What instructions a cubin's kernels are made of, by NVIDIA's disassembler."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import compilers

ALL_KERNELS_WITHOUT = {
    "LDL": "local memory",
    "STL": "local memory",
    **dict.fromkeys(("ATOM", "ATOMG", "ATOMS", "RED", "REDG"), "atomics"),
}
# Of a kernel by the start of its name: an opcode that it must hold.
KERNELS_WITH = [
    *(
        ("(project|expand|weight_gradient)<", opcode, what)
        for opcode, what in [
            (r"HMMA\.16816\.F32\.BF16", "tensor cores"),
            (r"LDGSTS\..*128", "asynchronous copies of 16 bytes"),
            (r"LDSM\..*4", "four matrices at once from shared memory"),
        ]
    ),
    ("expand<", r"STG\.E\.128", "stores of 16 bytes"),
    (r"(project|expand)<.*fp32, \d+>", r"LDG\.E\.128", "loads of 16 bytes of a factor"),
]


def disassembler() -> Path | None:
    """Of the toolkit, on PATH, or of pip's package nvidia-cuda-nvdisasm."""
    toolkit, package = compilers.find_toolkit(), importlib.util.find_spec("nvidia")
    found = shutil.which("nvdisasm")
    candidates = [] if toolkit is None else [toolkit.include.parent / "bin" / "nvdisasm"]
    candidates += [] if found is None else [Path(found)]
    folders = () if package is None else package.submodule_search_locations or ()
    candidates += [Path(folder) / "cu13" / "bin" / "nvdisasm" for folder in folders]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def opcodes(cubin: Path) -> dict[str, Counter[str]]:
    """How often each opcode, with its modifiers, stands in each kernel, by mangled names."""
    command = [str(disassembler()), "-c", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    _, *sections = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)
    counts = {}
    for section in sections:
        name = re.match(r"[\w$]+", section)[0]
        counts[name] = Counter(
            re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", section, re.MULTILINE)
        )
    return counts


def objections(kernel: str, counts: Counter[str]) -> list[str]:
    """What is wrong with a kernel of this short name."""
    wrong = {opcode: ALL_KERNELS_WITHOUT.get(opcode.split(".")[0]) for opcode in counts}
    found = [f"{opcode}: {what}" for opcode, what in sorted(wrong.items()) if what is not None]
    for start, wanted, what in KERNELS_WITH:
        if re.match(start, kernel) and not any(re.match(wanted, opcode) for opcode in counts):
            found.append(f"no {what}")
    return found
