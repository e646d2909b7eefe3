"""Warnings about rows, repeated by each run that uses rows cached by an earlier run or another process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

_FILE = "warnings.json"
_noted: ContextVar[list[str] | None] = ContextVar("noted", default=None)


def warn(message: str) -> None:
    """Warn of something in the rows: at once, or where `keeping` is on, when what is built is used."""
    noted = _noted.get()
    if noted is None:
        rank_zero_warn(message)
    else:
        noted.append(message)


@contextmanager
def keeping() -> Iterator[list[str]]:
    """Collect warnings in the returned list, on every rank, instead of emitting them."""
    noted: list[str] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def noting(build: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a function that builds a folder and stores its warnings there; on failure it emits them."""

    def _build(folder: Path) -> None:
        with keeping() as noted:
            try:
                build(folder)
            except Exception:
                for message in dict.fromkeys(noted):
                    rank_zero_warn(message)
                raise
        (folder / _FILE).write_text(json.dumps(noted), "utf-8")

    return _build


def tell_noted(folder: Path, told: set[str]) -> None:
    """Emit the warnings stored in a folder.

    Args:
        folder: What `noting` built.
        told: The warnings already emitted; the ones emitted now are added.
    """
    for message in json.loads((folder / _FILE).read_text("utf-8")):
        if message not in told:
            told.add(message)
            rank_zero_warn(message)
