"""The command `lora-lightning cache`."""

from __future__ import annotations

import time

from lora_lightning.data.cache import Entry, cache_folder, clear, entries, parse_size


def cache(clear_all: bool = False, keep: str | None = None) -> None:
    """List or clear the rows and tokens that data modules keep between runs.

    The folder is ~/.cache/lora_lightning, or that of LORA_LIGHTNING_CACHE; LORA_LIGHTNING_CACHE_SIZE limits its size
    (20GB). After clearing, a run encodes its data again, with the same results.

    Args:
        clear_all: Remove everything.
        keep: Remove the least recently used entries until the others are of this size, such as 5GB.
    """
    if clear_all or keep is not None:
        removed = clear(0 if clear_all or keep is None else parse_size(keep, "keep"))
        print(f"{len(removed)} entries removed ({_shown(sum(one.size for one in removed))}).")
    kept = entries()
    for one in kept:
        print(_line(one))
    print(f"{cache_folder()}: {len(kept)} entries, {_shown(sum(one.size for one in kept))}.")


def _line(entry: Entry) -> str:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    return f"{_shown(entry.size):>10}  {used}  {entry.path.name}"


def _shown(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.2f} MB"
