# SPDX-License-Identifier: Apache-2.0
"""The page of features says what trying each of them says."""

from __future__ import annotations

import pytest
from feature_tuners import FEATURES, TUNERS
from features import PAGE, page, works
from tuner_helpers import needs_new_peft

pytestmark = needs_new_peft


@pytest.mark.parametrize("title", FEATURES)
def test_ours_has_the_feature(title: str) -> None:
    assert works(TUNERS[-1], title) == ""


def test_the_page_is_what_was_tried() -> None:
    assert PAGE.read_text("utf-8") == page(), "`python tests/features.py` rewrites the page"
