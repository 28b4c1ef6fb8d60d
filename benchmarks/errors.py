"""How a case says that it cannot be measured here; what the user can mend is a JobError, as in the other commands."""

from __future__ import annotations


class Skip(Exception):
    """The reason, in one sentence; the run goes on without the case."""
