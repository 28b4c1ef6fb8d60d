# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a merge in files: fair turns, and a run to its end on a model of some kilobytes."""

import pytest

from benchmarks import file_merge


def test_each_contender_runs_in_every_turn_in_an_order_drawn_anew_from_the_same_state(tmp_path, monkeypatch):
    base, out, log = tmp_path / "base", tmp_path / "out", []
    base.mkdir()
    (base / "model.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(file_merge.os, "sync", lambda: log.append("sync"))
    monkeypatch.setattr(file_merge.time, "sleep", lambda seconds: log.append(seconds))

    def contender(name, seconds):
        def call():
            out.mkdir()  # what the one before has written is gone
            log.append(name)
            return seconds, 7.0 if name == "merge" else 0.0

        return call

    names = {"cp": 1.0, "merge": 2.0, "PEFT": 3.0}
    found = file_merge.in_turns({n: contender(n, s) for n, s in names.items()}, base, out, 6)
    assert found["seconds"] == {name: [seconds] * 6 for name, seconds in names.items()}
    assert found["growth"] == 7.0 and not out.exists()
    assert all(sorted(turn) == sorted(names) for turn in found["order"])
    assert len({tuple(turn) for turn in found["order"]}) >= 3
    assert log == [e for turn in found["order"] for n in turn for e in ("sync", file_merge.REST_SECONDS, n)]


@pytest.mark.long
def test_measures_copy_merge_and_peft(tmp_path, monkeypatch):
    width, keys, inner = 64, 16, 96
    sizes = {file_merge.WIDTH: width, file_merge.KEYS: keys, file_merge.INNER: inner}
    small = {name: tuple(sizes[size] for size in shape) for name, shape in file_merge.LINEAR.items()}
    for name, value in (("WIDTH", width), ("KEYS", keys), ("INNER", inner), ("WORDS", 32), ("LINEAR", small)):
        monkeypatch.setattr(file_merge, name, value)
    monkeypatch.setattr(file_merge, "REST_SECONDS", 0)
    found = file_merge.measure(tmp_path, turns=1)
    assert {name: len(values) for name, values in found["seconds"].items()} == {"cp": 1, "merge": 1, "PEFT": 1}
    assert found["beside_copy"] > 0 and found["beside_peft"] > 0 and found["growth"] < 64 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
