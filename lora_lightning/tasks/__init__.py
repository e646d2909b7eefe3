"""Tasks: each defines head, loss, metrics and predictions."""

from typing import TYPE_CHECKING

from lora_lightning.public import import_classes
from lora_lightning.strategies import FSDP2Strategy

if TYPE_CHECKING:
    from lora_lightning import *  # noqa: F403 - for type checkers alone, which read the static table

_CLASSES = import_classes("tasks")
globals().update(_CLASSES)

__all__ = [*_CLASSES, "FSDP2Strategy"]
