# SPDX-License-Identifier: Apache-2.0
"""The command line: ``gralora-ext finetune`` and ``gralora-ext info``."""

from .main import main

__all__ = ["main"]
