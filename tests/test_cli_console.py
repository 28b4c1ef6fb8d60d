# SPDX-License-Identifier: Apache-2.0
"""The progress that a person sees: a bar on a terminal, lines where the output goes elsewhere."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

from cli_helpers import environment

SCRIPT = """
from gralora_ext.program.console import Console
console = Console()
with console.bar("step", 3, first=True) as bar:
    for step in (1, 2, 3):
        bar.update(step, f"loss {4 - step}.0, 80 tokens/s")
console.say("done")
"""


def start(**streams: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment(COLUMNS=""), text=True, **streams)


def test_lines_show_the_first_and_the_last_step():
    out, err = start(stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate(timeout=60)
    lines = [line.split("] ", 1)[1] for line in out.splitlines()]
    assert lines == ["step 1/3: loss 3.0, 80 tokens/s", "step 3/3: loss 1.0, 80 tokens/s", "done"]
    assert err == ""


def test_bar_shows_on_a_terminal_even_of_unknown_width():
    ours, theirs = os.openpty()  # it has no size
    process = start(stdout=subprocess.PIPE, stderr=theirs)
    assert process.stdout is not None
    lines = process.stdout.read()
    process.wait(timeout=60)
    # Before our copy of its end is closed: what is underway can get lost when all are. On a busy machine it takes its time.
    shown, deadline = "", time.monotonic() + 30
    while "loss 1.0, 80 tokens/s" not in shown and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.5)[0]:
            shown += os.read(ours, 100_000).decode(errors="replace")
    os.close(theirs)
    os.close(ours)
    assert "step" in shown and "3/3" in shown and "loss 1.0, 80 tokens/s" in shown
    assert "step" not in lines and "done" in lines
