# SPDX-License-Identifier: Apache-2.0
"""Values of ``gralora_k``: the one of the paper's ratio, and the text that a configuration is saved with. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

CHOICES = (1, 2, 4, 8)
RATIO = 8  # r/k² of the best settings in arXiv 2505.20355
_MARKED = re.compile(r"(\d{1,9}|auto) \(needs gralora_ext: [\w, ]+\)")


def nearest_k(r: int, ks: Iterable[int] = CHOICES) -> int:
    """The one of ``ks`` that brings r/k² nearest to 8. No whole r is as near with two of :data:`CHOICES`."""
    return min(ks, key=lambda k: abs(r / k**2 - RATIO))


def plain_k(said: Any) -> Any:
    """``gralora_k`` without the note that :class:`gralora_ext.GraloraConfig` puts behind it."""
    marked = _MARKED.fullmatch(said) if isinstance(said, str) else None
    return said if not marked else "auto" if marked[1] == "auto" else int(marked[1])
