"""Anonymous memory of this process: bytes that no file backs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path


def anonymous_memory() -> int:
    """Return the bytes of memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


class Peak:
    """Looks at the memory a hundred times a second."""

    def __init__(self) -> None:
        self.most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        """Start to look."""
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Stop to look."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, anonymous_memory())


def peak_anonymous(run: Callable[[], None]) -> int:
    """Return the most anonymous memory while a function runs, above that before it, in bytes."""
    peak, before = Peak(), anonymous_memory()
    with peak:
        run()
    return peak.most - before
