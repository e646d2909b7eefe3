"""Lightning's rich progress bar, which reads the metrics no more often than anybody can."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from lora_lightning.keywords import ForwardsSettings
from lora_lightning.tasks.log_pace import SECONDS_BETWEEN_VALUES

__all__ = ["PacedProgressBar"]


class PacedProgressBar(ForwardsSettings, RichProgressBar):
    """Shows progress and metrics; it reads the metrics at most ten times a second while it trains.

    Every read makes the host wait for the device, so Lightning's bar, which reads at every step, keeps a GPU from being
    fed ahead of time.

    Args:
        refresh_rate: How many batches pass between two updates of the bar; 0 shows none.
        leave: Whether the bar of an epoch stays on the screen when the next one starts.
        theme: Colours and styles.
        console_kwargs: Arguments of the `rich.console.Console` that the bar is drawn on.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:  # noqa: ANN401 - those of RichProgressBar
        super().__init__(*args, **settings)
        self._read_at = float("-inf")
        self._metrics: dict[str, Any] = {}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return what stands beside the bar: as just read, or as read less than a tenth of a second ago."""
        is_amid_epoch = trainer.training and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not is_amid_epoch:
            return dict(super().get_metrics(trainer, pl_module))
        if time.monotonic() - self._read_at >= SECONDS_BETWEEN_VALUES:
            self._read_at, self._metrics = time.monotonic(), super().get_metrics(trainer, pl_module)
        return self._metrics
