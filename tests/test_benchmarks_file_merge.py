# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a merge in files runs to its end, on a model of some kilobytes."""

import pytest

from benchmarks import file_merge


@pytest.mark.long
def test_measures_copy_merge_and_peft(tmp_path, monkeypatch):
    width, keys, inner = 64, 16, 96
    sizes = {file_merge.WIDTH: width, file_merge.KEYS: keys, file_merge.INNER: inner}
    small = {name: tuple(sizes[size] for size in shape) for name, shape in file_merge.LINEAR.items()}
    for name, value in (("WIDTH", width), ("KEYS", keys), ("INNER", inner), ("WORDS", 32), ("LINEAR", small)):
        monkeypatch.setattr(file_merge, name, value)
    found = file_merge.measure(tmp_path, turns=1)
    assert {name: len(values) for name, values in found["seconds"].items()} == {"cp": 1, "merge": 1, "PEFT": 1}
    assert found["beside_copy"] > 0 and found["beside_peft"] > 0 and found["growth"] < 64 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
