# SPDX-License-Identifier: Apache-2.0
"""The page of features says what trying each of them says."""

from __future__ import annotations

import pytest
from feature_tuners import FEATURES, TUNERS
from features import PAGE, page, works
from tuner_helpers import needs_new_peft

pytestmark = needs_new_peft


TRIED = [title for title, feature in FEATURES.items() if feature.can_be_tried]


@pytest.mark.parametrize("title", [title for title in TRIED if not FEATURES[title].later])
def test_ours_has_the_feature(title: str) -> None:
    assert works(TUNERS[-1], title) == ""


@pytest.mark.parametrize("title", [title for title in TRIED if FEATURES[title].later])
def test_what_comes_later_is_refused_in_a_sentence(title: str) -> None:
    assert works(TUNERS[-1], title).startswith(("ValueError: ", "TypeError: Target module "))


def test_the_page_is_what_was_tried() -> None:
    assert PAGE.read_text("utf-8") == page(), "`python tests/features.py` rewrites the page"
