# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext finetune``: one stage of the job after the other, in one process or in several, and how it ends."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from ..program.errors import JobError, Stopped, stops_unwrapped
from ..program.files import locked
from ..program.resources import memory_failure
from ..program.signals import reader_may_be_gone
from .group import Group, end_by
from .job import Job
from .publish import publish

_LESS = "; with --no-merge it writes no merged model, which takes as much memory as the base once more"
DIVERGED = 3  # the exit code of a job that ended, with its results, because its numbers were finite no more


def run(options: argparse.Namespace, group: Group) -> int:
    """Runs the job, or its part in one of several processes; returns the exit code. JobError: what the user can mend.

    Of several processes the first one writes and speaks, and its exit code is the job's; the others return 0.
    """
    job = Job(options, group)
    try:
        with stops_unwrapped(), ExitStack() as lock:
            with group.together():
                job.check()
            with group.together():
                job.meet()
                job.prepare()
            with group.together():
                job.compare_content()
                if group.is_first:
                    lock.enter_context(locked(job.output.folder, wait=False))
                job.begin()
            with group.held():
                job.train()
                job.collect()
            if not group.is_first:
                return 0
            try:
                publish(job)
            except Exception as error:
                if not (reason := memory_failure(error)):
                    raise
                less = _LESS if options.merge else ""
                raise JobError(f"{reason}, when results were written: {job.how_to_go_on()}{less}") from error
    except Stopped as stop:
        if not group.is_first:
            return 0 if group.agreed else end_by(stop.signum)
        with reader_may_be_gone(sys.stderr):
            print(f"stopped by {stop.name}: {job.how_to_go_on()}", file=sys.stderr, flush=True)
        return stop.exit_code
    except Exception as error:
        if not group.has_lost(error):
            raise
        group.leave_lost(f"a process of this job has ended, or did not answer in time: {job.how_to_go_on()}")
    if job.diverged is None:
        return 0
    print(f"gralora-ext: the job has diverged: {job.diverged}; {job.what_to_do_now()}", file=sys.stderr)
    return DIVERGED
