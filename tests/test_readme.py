# SPDX-License-Identifier: Apache-2.0
"""README is short, its code runs as it is pasted, and a program writes its figures."""

from __future__ import annotations

import re
import runpy

import pytest
from error_messages import ROOT

import gralora_ext

FIGURES = {"step", "path", "one-token", "kept", "merge", "file-merge", "job"}
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/**/*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES["README.md"] = README


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


PROGRAMS = [
    pytest.param(block, id=f"{page}-{i}")
    for page, text in sorted(PAGES.items())
    for i, block in enumerate(_blocks(text, "python"))
    if "--8<--" not in block  # an example, which has a test of its own
]


@pytest.mark.parametrize("block", PROGRAMS)
def test_python_runs_as_it_is_pasted(block, tmp_path):
    (tmp_path / "pasted.py").write_text(block, encoding="utf-8")
    try:
        runpy.run_path(str(tmp_path / "pasted.py"), run_name="__main__")
    finally:
        gralora_ext.disable()


def test_the_marked_blocks_are_the_lines_that_ci_runs():
    marked = re.findall(r"^<!-- ci runs the next block -->\n```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert marked == ["bash scripts/finetune.sh\n", "bash scripts/test.sh\n"]


def test_readme_names_at_most_eight_limits():
    limits = README.split("\n## Limits\n")[1].split("\n## ")[0]
    assert 1 <= len(re.findall(r"^(?:\d+\.|-) ", limits, re.MULTILINE)) <= 8


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_figures_stand_between_markers(page):
    names = re.findall(
        r"^<!-- figures: (\S+) -->\n(?:(?!<!--).*\n)*?<!-- end of figures -->$", PAGES[page], re.MULTILINE
    )
    assert names and set(names) <= FIGURES
    assert (
        len(names)
        == len(set(names))
        == PAGES[page].count("<!-- figures:")
        == PAGES[page].count("<!-- end of figures -->")
    )


def test_readme_types_no_figures_of_speed():
    prose = re.sub(r"<!-- figures: .*?<!-- end of figures -->", "", README, flags=re.DOTALL)
    speed = prose.split("\n## Speed\n")[1].split("\n## ")[0]
    assert not re.search(r"\d+(\.\d+)? ?(%|ms|s|MB|MiB|times|tokens)\b", speed)
