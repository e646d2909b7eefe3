"""The name of a base model, as others can use it."""

from __future__ import annotations

import re
from pathlib import Path

from lora_lightning.backbones.gguf import cache_root

_HUB_CACHE = re.compile(r"(?:^|[\\/])models--([^\\/]+)[\\/]snapshots[\\/]")


def public_name(name: str) -> str | None:
    """Return the name by which others may know a base: never a path inside a cache of this machine.

    Args:
        name: Hub name, folder, or path inside a cache.

    Returns:
        The name; the Hub name of what lies in the Hub's cache; None for what lies in this library's own.

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
