# SPDX-License-Identifier: Apache-2.0
"""Merges in files that are broken off, and what is changed between two tries."""

import json
import os

import pytest

from gralora_ext.checkpoint import merge, pipeline


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def break_off(monkeypatch, base, adapter, out, after=1, **how):
    """A merge that fails when it has finished so many files of weights."""
    write, count = pipeline.Pipeline.write, 0

    def broken(*args):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.Pipeline, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            merge(base, adapter, out, **how)


def flip(path):
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if it were older


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
