# SPDX-License-Identifier: Apache-2.0
"""What a result says of the place where it was made."""

from __future__ import annotations

import subprocess

from gralora_ext.program.machine import commit, machine, slug


def test_a_folder_within_a_checkout_is_not_taken_for_the_checkout(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a", *words], check=True,
                       capture_output=True)  # fmt: skip

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "one")
    found = commit(tmp_path)
    assert len(found["commit"]) == 40 and found["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == {**found, "dirty": True}
    (tmp_path / "site-packages").mkdir()
    assert commit(tmp_path / "site-packages") == {"commit": None, "dirty": None}


def test_a_machine_is_told_by_its_processor_and_cores():
    found = machine()
    assert found["cpu"] and found["cores"] >= 1 and found["memory"] > 2**20 and found["gpu"] is None
    assert slug({"cpu": "Some(R) CPU 9 @ 2 GHz", "cores": 4, "gpu": None}) == "some-9-4c"
