"""Decide at which training steps values are logged."""

from __future__ import annotations

import time
from collections.abc import Mapping

import lightning as L
from torch import Tensor

SECONDS_BETWEEN_VALUES = 0.1


class LogPace:
    """Logs training values only when a logger or a callback reads them.

    `LightningModule.log` costs 0.6 ms of CPU time for each value. Values are logged when Lightning passes them to the
    loggers (`log_every_n_steps`), at the first step, at the last step of an epoch and of the run, at every step if a
    callback monitors a training metric, and otherwise ten times a second, for the progress bar.
    """

    def __init__(self) -> None:
        self._last = float("-inf")

    def log(self, task: L.LightningModule, values: Mapping[str, Tensor], batch_size: int) -> None:
        """Log scalars of a training step as `train/<name>` at logging steps, the first also in the progress bar."""
        if not self.is_due(task.trainer):
            return
        for number, (name, value) in enumerate(values.items()):
            task.log(f"train/{name}", value.detach(), prog_bar=number == 0, batch_size=batch_size)

    def is_due(self, trainer: L.Trainer) -> bool:
        """Return whether the current step should log its values."""
        loop = trainer.fit_loop.epoch_loop
        is_due = (
            time.monotonic() - self._last >= SECONDS_BETWEEN_VALUES
            or trainer._logger_connector.should_update_logs
            or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by Lightning's debugging setup
            or loop.batch_progress.is_last_batch
            or loop.global_step + 1 == loop.max_steps
            or any(_is_of_training(getattr(callback, "monitor", None)) for callback in trainer.callbacks)  # type: ignore[attr-defined]  # set by Lightning's callback connector
        )
        if is_due:
            self._last = time.monotonic()
        return is_due


def _is_of_training(monitor: object) -> bool:
    return isinstance(monitor, str) and not monitor.startswith(("val/", "test/"))
