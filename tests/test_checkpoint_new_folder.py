# SPDX-License-Identifier: Apache-2.0
"""The folder that ``export-lora`` and ``import-official`` write: the one that is there, and an adapter's only when it is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from export_helpers import CONFIG, WEIGHTS

from gralora_ext.checkpoint.new_folder import new_folder
from gralora_ext.program import files
from gralora_ext.program.errors import FileError, JobError


def write(out: Path) -> None:
    with new_folder(out) as folder:
        (folder / CONFIG).write_text("{}")
        (folder / WEIGHTS).write_text("weights")


def test_a_folder_that_is_there_stays_the_same_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    before = out.stat()
    write(out)
    after = out.stat()
    assert (after.st_ino, after.st_mode, after.st_uid) == (before.st_ino, before.st_mode, before.st_uid)
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_renamed_out_of_the_folder_nor_into_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point cannot be renamed, and its parent may not be written."""
    out = tmp_path / "out"
    out.mkdir()
    real, moved = os.replace, []

    def told(source: Path, target: Path) -> None:
        moved.append((Path(source), Path(target)))
        real(source, target)

    monkeypatch.setattr(os, "replace", told)
    monkeypatch.setattr(Path, "rename", None)
    write(out)
    assert [target.name for _, target in moved] == [WEIGHTS, CONFIG]
    assert all(out in source.parents and target.parent == out for source, target in moved)


def test_a_killed_run_leaves_no_adapter_and_the_next_one_clears_it(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from gralora_ext.checkpoint.new_folder import new_folder\n"
        f"with new_folder(Path(sys.argv[1])) as f: (f / '{WEIGHTS}').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", program, out], check=False)
    assert done.returncode == -9
    (left,) = out.iterdir()
    assert left.name.startswith(files.PARTIAL) and [path.name for path in tmp_path.iterdir()] == ["out"]
    write(out)
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, WEIGHTS]


def test_what_a_killed_run_left_is_not_cleared_beside_other_files(tmp_path: Path) -> None:
    (tmp_path / f"{files.PARTIAL}x").mkdir()
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileError, match=r"holds other files \(mine\)"):
        write(tmp_path)
    assert (tmp_path / f"{files.PARTIAL}x").is_dir()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="out is in use by another gralora-ext job"), new_folder(tmp_path / "out"):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_come_meanwhile_are_not_mixed_with_ours(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"holds other files \(mine\)"), new_folder(tmp_path / "out") as folder:
        (folder / CONFIG).write_text("{}")
        (tmp_path / "out" / "mine").write_text("mine")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_may_not_be_written_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "parent" / "out").mkdir(parents=True)
    (tmp_path / "parent").chmod(0o500)
    try:
        write(tmp_path / "parent" / "out")
    finally:
        (tmp_path / "parent").chmod(0o700)


def test_the_home_folder_may_be_written_as_a_tilde_for_all_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from checkpoint_helpers import gralora, llama, save_adapter, save_base
    from official_helpers import make

    from gralora_ext.checkpoint import export_lora, import_official
    from gralora_ext.cli.merge import parse

    monkeypatch.setenv("HOME", str(tmp_path))
    base = save_base(tmp_path / "base", llama(num_hidden_layers=1))
    save_adapter(tmp_path / "a", base, gralora(target_modules=["q_proj"]))
    make(tmp_path / "official", base)
    export_lora("~/a", "~/lora")
    import_official("~/official", "~/imported")
    assert (tmp_path / "lora" / CONFIG).is_file() and (tmp_path / "imported" / CONFIG).is_file()
    assert parse(["~/base", "~/a", "~/out"]).folders == ["~/base", "~/a", "~/out"]
