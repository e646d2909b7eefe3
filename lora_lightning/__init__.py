"""Parameter-efficient fine-tuning as plain PyTorch Lightning.

Names are imported when they are first used, so `import lora_lightning` costs next to nothing. They stand in the static
table `__init__.pyi`, which `scripts/public` writes.
"""

from __future__ import annotations

from typing import Any

from lora_lightning.public import find, table

__version__ = "0.1.0"

__all__ = sorted([*table().modules, "__version__"])


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import a public name from the module that defines it."""
    if name not in table().modules:
        raise AttributeError(f"module 'lora_lightning' has no attribute {name!r}")
    value = find(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
