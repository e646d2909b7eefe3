"""Count how often this process opens files, and how often a file's bytes are digested."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ACTIVE: list[Counter[str]] = []
_IS_WATCHED = False


@contextmanager
def opened_for_reading(suffix: str) -> Iterator[Counter[str]]:
    """Count, by its real path, how often each file with a suffix is opened for reading inside the block."""
    global _IS_WATCHED
    if not _IS_WATCHED:
        sys.addaudithook(_note)
        _IS_WATCHED = True
    counter: Counter[str] = Counter()
    _ACTIVE.append(counter)
    try:
        yield counter
    finally:
        _ACTIVE.remove(counter)
        for name in [name for name in counter if not name.endswith(suffix)]:
            del counter[name]


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _ACTIVE or event != "open":
        return
    path, mode = arguments[0], arguments[1]
    is_reading = isinstance(mode, str) and not set(mode) & set("wxa")
    if isinstance(path, str | bytes | Path) and is_reading:
        name = str(Path(path.decode() if isinstance(path, bytes) else path).resolve())
        for counter in _ACTIVE:
            counter[name] += 1
