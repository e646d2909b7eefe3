"""The library's cache folder: what data modules read and encode once, for all ranks and later runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.errors import ConfigError, DataError

FOLDER_VARIABLE = "LORA_LIGHTNING_CACHE"
SIZE_VARIABLE = "LORA_LIGHTNING_CACHE_SIZE"
_USUAL_SIZE = "20GB"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNFINISHED = ".unfinished-"
# The workers of a run may still have entries open that were used this recently.
_IN_USE_SECONDS = 3600


@dataclass(frozen=True)
class Entry:
    """An entry of the cache.

    Args:
        path: Its folder.
        size: Its size in bytes.
        used: When it was last used, in seconds since 1970.
    """

    path: Path
    size: int
    used: float


def cache_folder() -> Path:
    """Return the cache folder: `$LORA_LIGHTNING_CACHE`, else `lora_lightning` in the user's cache folder."""
    own = os.environ.get(FOLDER_VARIABLE)
    if own:
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(users).expanduser() / "lora_lightning"


def size_limit() -> int:
    """Return how many bytes the cache may hold: `$LORA_LIGHTNING_CACHE_SIZE`, such as `5GB`, else 20 GB.

    Raises:
        ConfigError: The variable holds no size.
    """
    return parse_size(os.environ.get(SIZE_VARIABLE) or _USUAL_SIZE, SIZE_VARIABLE)


def parse_size(text: str, name: str) -> int:
    """Read a size such as `500MB`.

    Args:
        text: A number with a unit.
        name: The setting, for the message.

    Raises:
        ConfigError: It is none.

    Example:
        >>> parse_size("1.5KB", "size")
        1500
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
        raise ConfigError(f"{name} is {text!r}: expected a number with KB, MB, GB or TB, such as 5GB.")
    return int(float(number) * _UNITS[unit])


def key_of(*parts: Any) -> str:  # noqa: ANN401 - whatever JSON can hold
    """Return 32 hexadecimal digits that identify everything a cached entry depends on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def temporary_folder(owner: object) -> Path:
    """Return a new folder outside the cache that is removed when an object is deleted."""
    folder = Path(tempfile.mkdtemp(prefix="lora-lightning-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of an entry; build it if there is none, in one process of this machine.

    The entry is built in a temporary folder and renamed, so that no process sees an incomplete one.

    Args:
        name: Name of the entry, with its key.
        build: Fills a new folder.

    Raises:
        DataError: The cache folder cannot be written.
    """
    from filelock import FileLock

    root = cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            return _found_or_built(root / name, build)
    except OSError as error:
        raise DataError(
            f"The cache folder {root} cannot be written: {error.strerror or error}. Set {FOLDER_VARIABLE} to a folder "
            "with room, or cache to false."
        ) from error


def built(name: str | None, build: Callable[[Path], None], owner: object) -> Path:
    """Return the folder of an entry (see `cached`), or without a name a new one that is removed with its owner."""
    if name is not None:
        return cached(name, build)
    folder = temporary_folder(owner)
    build(folder)
    return folder


def entries() -> list[Entry]:
    """Return what the cache holds, the least recently used first."""
    found = (_entry(folder) for folder in cache_folder().glob("*/"))
    return sorted(filter(None, found), key=lambda entry: entry.used)


def clear(keep_bytes: int = 0, *, spare_seconds: float = 0) -> list[Entry]:
    """Remove the least recently used entries until the others hold at most `keep_bytes`.

    Args:
        keep_bytes: Number of bytes that may remain.
        spare_seconds: Entries used within this many seconds are always kept.

    Returns:
        The entries that were removed.
    """
    found = entries()
    total = sum(entry.size for entry in found)
    removed = []
    for entry in found:
        is_in_use = time.time() - entry.used < spare_seconds
        if total > keep_bytes and not is_in_use:
            shutil.rmtree(entry.path, ignore_errors=True)
            removed.append(entry)
            total -= entry.size
    return removed


def _found_or_built(folder: Path, build: Callable[[Path], None]) -> Path:
    if folder.is_dir():
        os.utime(folder)  # the least recently used entry is removed first
        return folder
    aside = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder.parent))
    try:
        build(aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    clear(size_limit(), spare_seconds=_IN_USE_SECONDS)
    return folder


def _entry(path: Path) -> Entry | None:
    """Return an entry; None for one that another process has just removed or renamed."""
    try:
        size = sum(file.stat().st_size for file in path.iterdir())
        return Entry(path, size, path.stat().st_mtime)
    except FileNotFoundError:
        return None
