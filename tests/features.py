# SPDX-License-Identifier: Apache-2.0
"""The page of what LoRA users do, made by trying each feature with LoRA, PEFT's GraLoRA and ours.

``python tests/features.py`` rewrites docs/features.md, and says why a tuner does not have a feature. What needs a
package that is not installed, or another processor, keeps its row.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import features_config  # noqa: F401  registers features, in the order of the page
import features_life  # noqa: F401
import features_models  # noqa: F401
import features_quantized  # noqa: F401
import torch
from feature_tuners import FEATURES, TUNERS, Tuner

import features_later  # noqa: F401 isort: skip  the last

PAGE = Path(__file__).resolve().parent.parent / "docs" / "features.md"


def works(tuner: Tuner, title: str) -> str:
    """ "", or why the feature does not work."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), tuner.in_use():
        warnings.simplefilter("ignore")
        try:
            FEATURES[title].try_it(tuner)
        except Exception as error:  # noqa: BLE001  whatever a tuner without it raises
            return f"{type(error).__name__}: {error}"
    return ""


def mark(tuner: Tuner, title: str) -> str:
    missing = "later" if tuner.is_ours and FEATURES[title].later else "–"
    return missing if works(tuner, title) else "✓"


def row(title: str) -> str:
    """The feature's line; as it stands on the page where it cannot be tried here."""
    start = f"| {title} | "
    if FEATURES[title].tells_them_apart:
        return start + " | ".join(mark(tuner, title) for tuner in TUNERS) + " |"
    return next(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(start))


HEAD = """\
# What LoRA users do, with GraLoRA

Made by `python tests/features.py`, which tries each line on a small model and checks its numbers, and compared by a test. PEFT is the newest
version that this project is tested with. "later": ours refuses it today, in a sentence that names it. Engines that split or offload a
model are tried in a [table of their own](peft.md#engines).

"""


def page() -> str:
    lines = ["| | " + " | ".join(tuner.title for tuner in TUNERS) + " |", "| --- |" + " --- |" * len(TUNERS)]
    return HEAD + "\n".join([*lines, *(row(title) for title in FEATURES)]) + "\n"


def main() -> int:
    for title, feature in FEATURES.items():
        for tuner in TUNERS if feature.can_be_tried else ():
            if reason := works(tuner, title):
                print(f"{tuner.title}, {title}: {reason.splitlines()[0][:160]}")
    PAGE.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
