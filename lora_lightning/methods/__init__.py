"""The methods of the literature, one file each."""

from typing import TYPE_CHECKING

from lora_lightning.public import import_classes

if TYPE_CHECKING:
    from lora_lightning import *  # noqa: F403 - for type checkers alone, which read the static table

_CLASSES = import_classes("methods")
globals().update(_CLASSES)

__all__ = list(_CLASSES)
