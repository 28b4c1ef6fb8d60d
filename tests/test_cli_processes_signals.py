# SPDX-License-Identifier: Apache-2.0
"""Signals that come to one of several processes, or while libraries are imported: all stop, and nobody tells of another error."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from gralora_ext.cli.group import Group
from gralora_ext.cli.launcher import Place
from gralora_ext.cli.main import main
from gralora_ext.program.errors import JobError, Stopped, stops_unwrapped
from gralora_ext.program.signals import Stopper


def test_signal_that_comes_to_one_process_twice_at_once_is_one(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stopper = Stopper()
    stopper.share(first=False)
    with pytest.raises(Stopped), stopper.held():
        stopper._handle(signal.SIGINT, None)
        stopper._handle(signal.SIGTERM, None)
        assert stopper.signum == signal.SIGINT and not ended
        later = time.monotonic() + 3
        monkeypatch.setattr(time, "monotonic", lambda: later)
        stopper._handle(signal.SIGTERM, None)
        assert ended == [128 + signal.SIGTERM]


class _Stops:
    """A signal comes while a class with such an attribute is made; Python 3.11 makes a RuntimeError of what it raises."""

    def __set_name__(self, owner, name):
        raise Stopped(signal.SIGINT)


def test_signal_that_comes_while_a_class_is_made_stops_the_job(monkeypatch, capsys):
    def imports(arguments):
        type("Imported", (), {"field": _Stops()})

    monkeypatch.setattr(sys.modules["gralora_ext.cli.main"], "_dispatch", imports)
    assert main(["finetune"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err.startswith("stopped by Ctrl-C before anything was trained")


def test_error_that_comes_after_a_signal_stays_an_error():
    with pytest.raises(OSError, match="disk"), stops_unwrapped():
        try:
            raise Stopped(signal.SIGINT)
        except Stopped:
            raise OSError("disk")  # noqa: B904  as where it is not known that something was stopped


def test_stage_of_the_job_tells_nobody_of_an_error_that_a_signal_caused():
    with pytest.raises(Stopped), Group(Place()).together():
        try:
            raise Stopped(signal.SIGTERM)
        except Stopped as stop:
            raise JobError("the model cannot be loaded") from stop


def test_signal_that_comes_while_processes_agree_is_told_the_next_time(monkeypatch):
    """Otherwise one process ends its training while the others go on, and wait for it."""
    own = Stopper()
    own.share(first=False)
    monkeypatch.setattr("gralora_ext.cli.group.stopper", own)
    group = Group(Place(1, 2, 1))
    with pytest.raises(Stopped), own.held():
        monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, op: own._handle(signal.SIGTERM, None))
        assert group.signal() is None and not group.agreed
        group.check_signal()
        monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, op: None)
        assert group.signal() == signal.SIGTERM and group.agreed


def test_signal_that_comes_while_processes_meet_waits_for_that(monkeypatch):
    """A process that left half way would end after the one that has lost it."""
    own = Stopper()
    monkeypatch.setattr("gralora_ext.cli.group.stopper", own)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **k: own._handle(signal.SIGTERM, None))
    group = Group(Place(0, 2, 0))
    with pytest.raises(Stopped):
        group.join(cuda=False)
    assert group.joined
