"""Portable names of base models."""

from __future__ import annotations

import re
from pathlib import Path

from lora_lightning.backbones.storage.gguf import cache_root

_HUB_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")
_HUB_CACHE = re.compile(r"(?:^|[\\/])models--([^\\/]+)[\\/]snapshots[\\/]")


def public_name(name: str) -> str | None:
    """Return the name of a base for other machines: never a path inside a cache of this machine.

    Args:
        name: Hub name, folder, or path inside a cache.

    Returns:
        The name; the Hub name for a path in the Hub's cache; None for a path in this library's cache.

    Example:
        >>> public_name("/home/me/.cache/huggingface/hub/models--org--base/snapshots/0a1b")
        'org/base'
        >>> public_name("models/base")
        'models/base'
    """
    match = _HUB_CACHE.search(name)
    if match is not None:
        return match[1].replace("--", "/")
    return None if Path(name).is_absolute() and Path(name).is_relative_to(cache_root()) else name


def name_for_others(name: str | None) -> str | None:
    """Return a name by which any machine can load a base: a Hub name or a `pkg://` path; None for a local folder.

    Args:
        name: Hub name, folder, or path inside a cache.
    """
    public = None if name is None else public_name(name)
    if public is None or public.startswith("pkg://"):
        return public
    is_local = Path(public).is_absolute() or Path(public).exists()
    return public if _HUB_NAME.fullmatch(public) and not is_local else None
