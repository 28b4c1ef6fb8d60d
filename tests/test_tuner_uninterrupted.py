# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C within what must come to its end is neither lost nor early, whatever the program does about it."""

from __future__ import annotations

import signal

import pytest
from helpers import run_python

from gralora_ext.tuner.uninterrupted import Uninterrupted


@pytest.fixture
def raises_on_ctrl_c():
    """As a program of Python begins, whatever other tests have set."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("raises_on_ctrl_c")
def test_it_comes_at_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest")
    assert done == ["the rest"]


def test_it_ends_a_program_that_lets_the_system_handle_it():
    with pytest.raises(AssertionError) as failed:
        run_python("""
import signal
from gralora_ext.tuner.uninterrupted import Uninterrupted
signal.signal(signal.SIGINT, signal.SIG_DFL)
with Uninterrupted():
    signal.raise_signal(signal.SIGINT)
    print("the rest", flush=True)
print("too far", flush=True)
""")
    assert "the rest" in str(failed.value) and "too far" not in str(failed.value)
