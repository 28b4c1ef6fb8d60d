# SPDX-License-Identifier: Apache-2.0
"""What a merge refuses before it writes anything."""

import pytest
from checkpoint_helpers import gralora, llama, save_adapter, save_base

from gralora_ext.checkpoint import merge
from gralora_ext.program.errors import FileError


def test_a_scale_for_an_adapter_that_holds_tensors_whole(tmp_path):
    base = save_base(tmp_path / "base", llama())
    adapter = save_adapter(tmp_path / "adapter", base, gralora(modules_to_save=["lm_head"]))
    for scale in (0, -1, 0.5):
        with pytest.raises(FileError, match=r"scale: expected 1 for .*adapter, since it holds lm_head\.weight whole"):
            merge(base, adapter, tmp_path / "out", scale=scale)
        assert not (tmp_path / "out").exists()
    merge(base, adapter, tmp_path / "out", scale=1)
