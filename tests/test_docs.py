# SPDX-License-Identifier: Apache-2.0
"""The documentation tells of every error, and what it points at is there."""

from __future__ import annotations

import re

import pytest
from error_messages import ROOT, messages

import gralora_ext

DOCS = ROOT / "docs"
# Here an error repeats what another program or another part of this one has said.
PASS_ON = {
    "csrc/bindings.cpp",
    "csrc/cpu/memory.h",
    "gralora_ext/cli/config_file.py",
    "gralora_ext/cli/finetune.py",
    "gralora_ext/cli/main.py",
    "gralora_ext/cli/options.py",
    "gralora_ext/cli/parser.py",
    "gralora_ext/cli/resume.py",
}


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "").replace("\\|", "|").split())


def _entries() -> list[tuple[str, str]]:
    """The messages of docs/troubleshooting.md, and what it says of each."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [(_plain(message), cure) for message, cure in rows if message not in ("message", "---")]


def test_each_error_has_an_entry_with_its_cause_and_cure():
    entries = _entries()
    assert all(cure.strip() for _, cure in entries)
    missing = [str(m) for m in messages() if m.texts and not any(_plain(m.stem) in entry for entry, _ in entries)]
    assert not missing, "add to docs/troubleshooting.md:\n" + "\n".join(missing)


def test_an_error_without_words_of_its_own_passes_on_those_of_another():
    assert {m.file for m in messages() if not m.texts} <= PASS_ON


def test_messages_are_found_in_all_forms_that_the_sources_use():
    found = {m.stem for m in messages()}
    assert "the rank r of A must be divisible by k, but r is" in found  # TORCH_CHECK_VALUE
    assert "model: expected a torch.nn.Module, got" in found  # an f-string
    assert "the compiler refused a source of gralora_ext" in found  # made by a function
    assert "GRALORA_EXT_CPU_AMX must be auto or 0, or unset, but it is" in found  # throw


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in DOCS.glob("*.md"))])
def test_relative_links_lead_to_files(page):
    path = ROOT / page if (ROOT / page).exists() else DOCS / page
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page}: {target}"


def test_what_the_page_on_the_cpu_names_is_in_the_sources():
    sources = [
        p for folder in ("csrc", "gralora_ext") for p in (ROOT / folder).rglob("*") if p.suffix in (".cpp", ".h", ".py")
    ]
    names = {p.relative_to(ROOT).as_posix() for p in sources}
    words = set(re.findall(r"\w+", "\n".join(p.read_text(encoding="utf-8") for p in sources)))
    spans = re.findall(r"`([^`\n]+)`", (DOCS / "how" / "cpu.md").read_text(encoding="utf-8"))
    assert len(spans) > 40
    for span in spans:
        if re.fullmatch(r"[\w/]+\.(cpp|h|py)", span):
            assert any(name.endswith(f"/{span}") or name == span for name in names), span
        else:
            assert set(re.findall(r"[A-Za-z_]\w+", span)) <= words, span


def test_the_api_page_has_every_public_name():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [name for name in gralora_ext.__all__ if name not in page and name != "__version__"] == []
