"""Lightning's rich progress bar, which reads the metrics at a limited rate."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from lora_lightning.keywords import ForwardsSettings
from lora_lightning.tasks.log_pace import SECONDS_BETWEEN_VALUES

__all__ = ["PacedProgressBar"]


class PacedProgressBar(ForwardsSettings, RichProgressBar):
    """Shows progress and metrics; during training it reads the metrics at most ten times a second.

    Every read synchronizes the host with the device. Lightning's bar reads at every step, so that the host cannot
    queue work for a GPU ahead of time.

    Args:
        refresh_rate: Number of batches between two updates of the bar; 0 disables it.
        leave: Whether the bar of an epoch stays on the screen when the next one starts.
        theme: Colours and styles.
        console_kwargs: Arguments of the `rich.console.Console` that the bar is drawn on.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:  # noqa: ANN401 - those of RichProgressBar
        super().__init__(*args, **settings)
        self._read_at = float("-inf")
        self._metrics: dict[str, Any] = {}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return the metrics beside the bar, read now or less than a tenth of a second ago."""
        is_amid_epoch = trainer.training and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not is_amid_epoch:
            return dict(super().get_metrics(trainer, pl_module))
        if time.monotonic() - self._read_at >= SECONDS_BETWEEN_VALUES:
            self._read_at, self._metrics = time.monotonic(), super().get_metrics(trainer, pl_module)
        return self._metrics
