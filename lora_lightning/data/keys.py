"""Cache keys of rows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_lightning.data.cache import key_of
from lora_lightning.data.rows.plan import Plan
from lora_lightning.data.rows.pool import kind_of
from lora_lightning.data.sources import describe, source_fingerprint

_VERSIONED = ("lora-lightning", "transformers", "tokenizers")
_FOREIGN = ("abc", "builtins", "lightning", "lightning_utilities", "typing")


@functools.cache
def code_digest(cls: type) -> str | None:
    """Return a digest of this package's code and of the files that define a class and its bases.

    Without it, a run could use rows that another version of the code has encoded.

    Args:
        cls: A data module.

    Returns:
        64 hexadecimal digits; None if a file cannot be read, such as for a class defined at a prompt.
    """
    digest = hashlib.sha256()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in _FOREIGN:
            continue
        try:
            digest.update(Path(inspect.getfile(base)).read_bytes())
        except (OSError, TypeError):
            return None
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def rows_key(cls: type, plan: Plan, settings: list[Any]) -> str:
    """Return the key of rows: the content of their sources, the reading settings, and the code that reads them.

    Args:
        cls: The data module.
        plan: Where its rows come from.
        settings: Its other settings that decide how records are read.
    """
    sources = {
        split: [[describe(one), source_fingerprint(one, plan.settings, kind_of(split))] for one in plan.parts(split)]
        for split in plan.sources
        if plan.has_own_source(split)
    }
    versions = [version(name) for name in _VERSIONED]
    divided = repr(dataclasses.replace(plan, sources={}))
    return key_of(versions, code_digest(cls), divided, sources, settings)


def ends_of(path: Path, size: int = 1 << 20) -> bytes:
    """Return what identifies a large file: its name, its size, its first and its last bytes."""
    total = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(size)
        file.seek(max(total - size, 0))
        return f"{path.name} {total}".encode() + first + file.read(size)
