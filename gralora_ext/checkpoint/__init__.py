# SPDX-License-Identifier: Apache-2.0
"""Models and adapters in files: checked before use, and read and written in pieces."""

from .merging import MergeReport, merge

__all__ = ["MergeReport", "merge"]
