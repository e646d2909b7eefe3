"""Load a checkpoint in the precision that it was written in."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.plugins.precision import DoublePrecision


def double_before_loading(module: L.LightningModule) -> None:
    """Put a module into double precision if its Trainer is going to do so.

    Lightning loads a checkpoint before it converts the module, so that doubles would be rounded to single precision.

    Args:
        module: The module, with or without a Trainer.
    """
    trainer = module._trainer
    if trainer is not None and isinstance(trainer.precision_plugin, DoublePrecision):
        module.double()
