# SPDX-License-Identifier: Apache-2.0
"""The page of what LoRA users do, made by trying each feature with LoRA, PEFT's GraLoRA and ours.

``python tests/features.py`` rewrites docs/features.md, and says why a tuner does not have a feature.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import features_config  # noqa: F401  registers features, in the order of the page
import features_life  # noqa: F401
import torch
from feature_tuners import FEATURES, TUNERS, Tuner

PAGE = Path(__file__).resolve().parent.parent / "docs" / "features.md"
LATER = [
    "experts (`target_parameters`)",
    "embeddings",
    "convolutions",
    "DoRA",
    "starts from the weights (PiSSA, EVA, CorDA, LoftQ)",
]


def works(tuner: Tuner, title: str) -> str:
    """ "", or why the feature does not work."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), tuner.in_use():
        warnings.simplefilter("ignore")
        try:
            FEATURES[title](tuner)
        except Exception as error:  # noqa: BLE001  whatever a tuner without it raises
            return f"{type(error).__name__}: {error}"
    return ""


HEAD = """\
# What LoRA users do, with GraLoRA

Made by `python tests/features.py`, which tries each line on a small model and checks its numbers, and compared by a test. PEFT is the newest
version that this project is tested with.

"""


def page() -> str:
    lines = ["| | " + " | ".join(tuner.title for tuner in TUNERS) + " |", "| --- |" + " --- |" * len(TUNERS)]
    for title in FEATURES:
        lines.append(f"| {title} | " + " | ".join("–" if works(tuner, title) else "✓" for tuner in TUNERS) + " |")
    later = "\n".join(f"- {what}" for what in LATER)
    return HEAD + "\n".join(lines) + f"\n\nLater:\n\n{later}\n"


def main() -> int:
    for title in FEATURES:
        for tuner in TUNERS:
            if reason := works(tuner, title):
                print(f"{tuner.title}, {title}: {reason.splitlines()[0][:160]}")
    PAGE.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
