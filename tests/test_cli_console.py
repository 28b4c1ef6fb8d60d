# SPDX-License-Identifier: Apache-2.0
"""The progress that a person sees: a bar on a terminal, lines where the output goes elsewhere."""

from __future__ import annotations

import importlib
import io
import os
import re
import select
import subprocess
import sys
import time

import pytest
from cli_helpers import environment

from gralora_ext.compare.runner import Runner
from gralora_ext.program.console import Console

SCRIPT = """
from gralora_ext.program.console import Console
console = Console()
with console.bar("step", 3, first=True) as bar:
    for step in (1, 2, 3):
        bar.update(step, f"loss {4 - step}.0, 80 tokens/s")
console.say("done")
"""


def start(**streams: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment(COLUMNS="", TQDM_DISABLE="1"), text=True, **streams
    )


def test_lines_show_the_first_and_the_last_step(capsys):
    exec(SCRIPT)  # noqa: S102
    out, err = capsys.readouterr()
    lines = [line.split("] ", 1)[1] for line in out.splitlines()]
    assert lines == ["step 1/3: loss 3.0, 80 tokens/s", "step 3/3: loss 1.0, 80 tokens/s", "done"]
    assert err == ""


def test_bar_shows_on_a_terminal_even_of_unknown_width():
    """Also where the switch for libraries' bars is off, which tqdm reads when it is imported."""
    ours, theirs = os.openpty()  # it has no size
    process = start(stdout=subprocess.PIPE, stderr=theirs)
    assert process.stdout is not None
    lines = process.stdout.read()
    process.wait(timeout=60)
    # Before our copy of its end is closed: what is underway can get lost when all are. On a busy
    # machine it takes its time.
    shown, deadline = "", time.monotonic() + 30
    while "loss 1.0, 80 tokens/s" not in shown and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.5)[0]:
            shown += os.read(ours, 100_000).decode(errors="replace")
    os.close(theirs)
    os.close(ours)
    assert "step" in shown and "3/3" in shown and "loss 1.0, 80 tokens/s" in shown
    assert "step" not in lines and "done" in lines


def test_the_time_left_on_a_terminal_does_not_count_runs_that_were_there(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", Terminal(io.StringIO()))
    console = Console()
    with console.bar("compare", 1000, first=True) as bar:
        assert bar.shown is not None
        now = bar.shown.start_t
        bar.shown._time = lambda: now
        runner = Runner(tmp_path, console, bar)
        for kept in range(1, 10):
            now += 0.2
            runner._leave_out(100)
            bar.update(kept * 100)
        for made in range(1, 6):
            now += 2
            bar.update(900 + made)
        assert re.search(r"<03:[0-4]\d", str(bar.shown)), "95 units are left, of two seconds each"


NOTES = ("loss 10.1234", "12,345 tokens/s", "lr 1.0e-03", "norm 0.52")


@pytest.mark.parametrize("total", [30, 3000, 30_000_000])
def test_a_line_holds_what_fits_into_80_columns_and_the_loss_always(total, capsys, monkeypatch):
    console = Console()
    console.start -= 12_345  # seconds ago
    with console.bar("step", total) as bar:
        bar.start, bar.last_line = console.start, 0.0
        bar.update(total // 2, *NOTES)
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) <= 80 and "loss 10.1234, 12,345 tokens/s" in line and "s left" in line
    assert ("lr 1.0e-03" in line) == (total < 3000)


@pytest.mark.parametrize("columns", [80, 120])
def test_a_bar_of_80_columns_is_not_cut(columns, monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 24)))
    shown = io.StringIO()
    monkeypatch.setattr("gralora_ext.program.console.sys.stderr", Terminal(shown))
    with Console().bar("step", 3000, first=True) as bar:
        bar.update(1500, *NOTES)
        bar.shown.refresh()
    last = shown.getvalue().strip("\r\n ").split("\r")[-1]
    assert len(last) <= columns and "step 1500/3000 |" in last and "loss 10.1234, 12,345 tokens/s" in last
    assert ("norm 0.52" in last) == (columns == 120)


class Terminal:
    def __init__(self, text):
        self.write, self.flush = text.write, text.flush

    def isatty(self):
        return True


def test_a_pipe_that_breaks_elsewhere_is_an_error_and_our_own_is_not(monkeypatch, capsys):
    def broken(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    main = importlib.import_module("gralora_ext.cli.main")  # the package has the function under this name
    monkeypatch.setattr(main, "_dispatch", broken)
    assert main.main(["info"]) == 1
    assert "gralora-ext: error: BrokenPipeError: [Errno 32] Broken pipe" in capsys.readouterr().err
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "gralora_ext", "--help"], env=environment(), stdout=write, stderr=subprocess.PIPE,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
