# SPDX-License-Identifier: Apache-2.0
"""Each command of the page "From training to serving" does what the page says, on a tiny model.

The page's Python is run by test_readme.py; its blocks of plain text are commands of other programs.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from checkpoint_helpers import gralora, llama, save_adapter, save_base
from cli_helpers import call
from error_messages import ROOT
from official_helpers import make
from peft import PeftConfig

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", "").splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what the commands name (``base``, ``adapter`` and ``official``), and what they have made of it."""
    place = tmp_path_factory.mktemp("serving")
    base = save_base(place / "base", llama())
    save_adapter(place / "adapter", base, gralora())
    make(place / "official", base)
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "gralora-ext"
        result = call(*arguments, cwd=place)
        assert result.returncode == 0 and result.stdout and not result.stderr, f"{command}\n{result.stderr}"
    return place


def test_each_command_runs_and_gives_what_the_page_tells(folder: Path) -> None:
    """One rank for vLLM, the one with which the page starts it, and PEFT's words for the import."""
    configs = {name: PeftConfig.from_pretrained(folder / name) for name in ("lora", "small", "served", "imported")}
    assert configs["lora"].r == 16 and configs["small"].r == 8
    assert f"--max-lora-rank {configs['served'].r} " in PAGE and configs["served"].lora_alpha == configs["served"].r
    assert "gralora_alpha" not in json.loads((folder / "imported" / "adapter_config.json").read_text())
