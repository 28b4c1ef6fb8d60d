# SPDX-License-Identifier: Apache-2.0
"""Each source file of ours names its licence, and the licence names us."""

from __future__ import annotations

import pytest
from error_messages import ROOT

FOLDERS = ("gralora_ext", "csrc", "tests", "benchmarks", "examples", "scripts")
SUFFIXES = (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".sh")


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_source_names_its_licence(folder):
    sources = [p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in SUFFIXES]
    assert sources
    bare = [str(p) for p in sources if "SPDX-License-Identifier: Apache-2.0" not in p.read_text("utf-8")[:120]]
    assert not bare


def test_the_licence_names_its_holders():
    assert "Copyright 2026 The gralora_ext authors" in (ROOT / "LICENSE").read_text("utf-8")
