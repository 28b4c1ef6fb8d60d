# SPDX-License-Identifier: Apache-2.0
"""The files beside a base's weights go with the result, those in folders too, and nothing leads out of the result's folder."""

import json
import os

import pytest
from resume_helpers import contents

from gralora_ext.checkpoint import base as bases
from gralora_ext.checkpoint import merge, sealed
from gralora_ext.program.errors import FileError

COPIED = ("additional_chat_templates/tool_use.jinja", "1_Pooling/config.json", "a/b/notes.txt")
LEFT_OUT = (
    ".git/config",
    "a/.hidden",
    "__pycache__/x.pyc",
    "onnx/model.onnx",
    "onnx/config.json",
    "old/x/pytorch_model.bin",
    "old/y",
)


@pytest.fixture
def with_folders(own_sharded):
    base, adapter, out = own_sharded
    for name in (*COPIED, *LEFT_OUT):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    return base, adapter, out


def below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_small_files_in_folders_are_copied(with_folders):
    base, adapter, out = with_folders
    merge(base, adapter, out)
    assert below(out) == below(base) - {*LEFT_OUT} | {"merge.json"}
    assert all((out / name).read_text() == name for name in COPIED)
    manifest = json.loads((out / "merge.json").read_text())
    assert {*COPIED} < manifest["outputs"].keys() and str(base / COPIED[0]) in manifest["inputs"]
    assert merge(base, adapter, out).was_done
    (base / COPIED[0]).write_text("new")
    with pytest.raises(FileError, match="tool_use.jinja was changed since"):
        merge(base, adapter, out)


def test_a_merge_anew_takes_away_what_it_wrote_in_folders_and_no_more(with_folders):
    base, adapter, out = with_folders
    merge(base, adapter, out)
    (out / "a" / "mine").write_text("mine")
    for name in COPIED[1:]:
        (base / name).unlink()
    (base / COPIED[0]).write_text("new")
    merge(base, adapter, out, overwrite=True)
    assert (out / COPIED[0]).read_text() == "new" and (out / "a" / "mine").read_text() == "mine"
    assert not (out / "1_Pooling").exists() and not (out / "a" / "b").exists()


def test_a_merge_that_is_broken_off_goes_on_with_files_in_folders(with_folders, monkeypatch):
    base, adapter, out = with_folders
    real = os.replace

    def killed(source, target):
        if str(target).endswith("notes.txt"):
            raise SystemExit
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            merge(base, adapter, out)
    assert not (out / "config.json").exists()
    merge(base, adapter, out)
    assert all((out / name).read_text() == name for name in COPIED)
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_that_leads_elsewhere_is_not_followed(with_folders, tmp_path, kind):
    base, adapter, out = with_folders
    merge(base, adapter, out)
    before = (out / COPIED[0]).read_text()
    place, elsewhere = out / "additional_chat_templates", tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere) if kind == "link" else place.write_text("mine")
    (base / COPIED[0]).write_text("new")
    with pytest.raises(FileError, match="additional_chat_templates is in the way, and no merge wrote it"):
        merge(base, adapter, out, overwrite=True)
    assert (elsewhere / "tool_use.jinja").read_text() == before


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ".hidden", "a/.hidden", "a//b", "", "a\0b"])
def test_a_manifest_that_names_what_is_not_inside_counts_for_nothing(with_folders, name):
    base, adapter, out = with_folders
    merge(base, adapter, out)
    content = json.loads((out / "merge.json").read_text())
    assert sealed.read_sealed(out / "merge.json") is not None
    del content["seal"]
    content["outputs"][name] = {"bytes": 1, "sha256": ""}
    sealed.write_sealed(out / "merge.json", content)
    assert sealed.read_sealed(out / "merge.json") is None


def test_the_result_may_lie_in_the_base_and_folders_of_data_are_refused(with_folders, monkeypatch):
    base, adapter, _ = with_folders
    merge(base, adapter, base / "merged")
    before = contents(base / "merged")
    assert merge(base, adapter, base / "merged").was_done and contents(base / "merged") == before
    monkeypatch.setattr(bases, "MOST_SMALL_FILES", 3)
    with pytest.raises(FileError, match="has more than 3 files beside its weights"):
        merge(base, adapter, base / "other")
