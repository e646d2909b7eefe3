"""Callbacks, one per file."""

from typing import TYPE_CHECKING

from lora_lightning.public import import_classes
from lora_lightning.resume import ExactResume

if TYPE_CHECKING:
    from lora_lightning import *  # noqa: F403 - for type checkers alone, which read the static table

_CLASSES = import_classes("callbacks")
globals().update(_CLASSES)

__all__ = [*_CLASSES, "ExactResume"]
