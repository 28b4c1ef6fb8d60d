# SPDX-License-Identifier: Apache-2.0
"""What must come to its end once it has begun."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Uninterrupted:
    """A block in which Ctrl-C waits for the end."""

    def __enter__(self) -> None:
        self.came: list[Any] = []
        main = threading.current_thread() is threading.main_thread()
        self.handler = signal.getsignal(signal.SIGINT) if main else None
        if self.handler is not None:  # None: another thread's business, or set by other than Python
            signal.signal(signal.SIGINT, lambda *arguments: self.came.append(arguments))

    def __exit__(self, *error: object) -> None:
        if self.handler is not None:
            signal.signal(signal.SIGINT, self.handler)
        if not self.came:
            return
        if callable(self.handler):
            self.handler(*self.came[-1])
        elif self.handler == signal.SIG_DFL:
            signal.raise_signal(signal.SIGINT)
