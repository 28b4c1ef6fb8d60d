# SPDX-License-Identifier: Apache-2.0
"""The configuration of the fused tuner: PEFT's own class, so that a checkpoint means the same on both sides."""

from __future__ import annotations

import peft

try:
    from peft import GraloraConfig
except ImportError as error:
    raise ImportError(
        f"gralora_ext needs peft 0.19.0 or newer (the first release with GraLoRA), found {peft.__version__}: "
        "run `pip install --upgrade peft`"
    ) from error

__all__ = ["GraloraConfig"]
