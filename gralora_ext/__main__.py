# SPDX-License-Identifier: Apache-2.0
"""``python -m gralora_ext`` is the console script ``gralora-ext``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
