"""Progress of a run as lines of plain text, for logs and pipes."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from lora_lightning.callbacks.places import log_interval
from lora_lightning.keywords import NamesNearest

__all__ = ["PlainProgress"]

SECONDS_BETWEEN_LINES = 60.0
"""If a logging interval takes longer than this, lines are also printed in between, at the end of a batch."""

_RATES = {"train/tokens_per_second": "tokens/s", "train/samples_per_second": "samples/s"}


class PlainProgress(NamesNearest, ProgressBar):
    """Prints a line per logging interval and per validation, and at least one a minute between batches.

    A line of training holds epoch, step, loss, learning rates, samples or tokens a second and the time left; a line of
    validation holds the metrics. The command uses it where stdout is not a terminal. Rank 0 alone prints.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled = True
        self._started_at = time.monotonic()
        self._printed_at = time.monotonic()
        self._first_step = 0
        self._last_step = 0

    def enable(self) -> None:
        """Print lines; Lightning calls it on rank 0."""
        self._is_enabled = True

    def disable(self) -> None:
        """Print no lines; Lightning calls it on the other ranks."""
        self._is_enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Lightning's own signature
        """Print a line of a task or of another callback."""
        if self._is_enabled:
            print(*args, **kwargs, flush=True)

    # Training.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the length of the run."""
        del pl_module
        self._start()
        self._first_step = self._last_step = trainer.global_step
        parts = [f"Training: {_steps_and_epochs(trainer)}", f"a line every {log_interval(trainer)} steps"]
        if trainer.global_step:
            parts.insert(1, f"from step {trainer.global_step}")
        self._line(", ".join(parts))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Print at the logging interval, or after a minute without a line."""
        del pl_module, outputs, batch, batch_idx
        step = trainer.global_step
        is_new_step = step != self._last_step
        is_due = is_new_step and step % log_interval(trainer) == 0
        if is_due or self._is_overdue():
            self._last_step = step
            self._line(self._training_line(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the metrics of a validation inside `fit`; after `validate` Lightning prints its table."""
        del pl_module
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = _numbers(trainer.callback_metrics, "val/")
        self._line("  ".join([_position(trainer), *metrics]))

    # Long evaluations.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of `validate`."""
        del pl_module
        if trainer.state.fn != "fit":
            self._start()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._start()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._start()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print after a minute without a line."""
        del pl_module, outputs, batch
        if self._is_overdue():
            self._line(_evaluation_line(trainer, batch_idx, dataloader_idx))

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    # Lines.

    def _start(self) -> None:
        self._started_at = self._printed_at = time.monotonic()

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES

    def _line(self, text: str) -> None:
        self._printed_at = time.monotonic()
        self.print(text)

    def _training_line(self, trainer: L.Trainer) -> str:
        metrics = trainer.callback_metrics
        parts = [_position(trainer), *_numbers(metrics, "train/"), _learning_rates(trainer)]
        parts += [f"{metrics[name]:.4g} {unit}" for name, unit in _RATES.items() if name in metrics][:1]
        parts.append(self._time_left(trainer))
        return "  ".join(part for part in parts if part)

    def _time_left(self, trainer: L.Trainer) -> str:
        total = trainer.estimated_stepping_batches
        num_done = trainer.global_step - self._first_step
        if math.isinf(total) or not num_done:
            return ""
        seconds = (time.monotonic() - self._started_at) / num_done * (total - trainer.global_step)
        return f"{_clock(seconds)} left"


def _evaluation_line(trainer: L.Trainer, batch_idx: int, dataloader_idx: int) -> str:
    """Return the progress of the current validation, test or prediction."""
    totals: Sequence[float]
    if trainer.predicting:
        stage, totals = "predict", trainer.num_predict_batches
    elif trainer.testing:
        stage, totals = "test", trainer.num_test_batches
    else:
        stage, totals = "validation", trainer.num_val_batches
    total = totals[dataloader_idx]
    of_total = "" if math.isinf(total) else f"/{int(total)}"
    of_set = f" of set {dataloader_idx + 1}" if dataloader_idx else ""
    return f"{stage}: batch {batch_idx + 1}{of_total}{of_set}"


def _steps_and_epochs(trainer: L.Trainer) -> str:
    total = trainer.estimated_stepping_batches
    steps = "no limit of steps" if math.isinf(total) else f"{int(total)} steps"
    epochs = trainer.max_epochs
    return steps if epochs is None or epochs < 1 else f"{steps} in at most {epochs} epochs"


def _position(trainer: L.Trainer) -> str:
    """Return epoch and step, each with its total if known."""
    max_epochs, total = trainer.max_epochs, trainer.estimated_stepping_batches
    of_epochs = f"/{max_epochs}" if max_epochs is not None and max_epochs > 0 else ""
    of_steps = "" if math.isinf(total) else f"/{int(total)}"
    return f"epoch {trainer.current_epoch + 1}{of_epochs}  step {trainer.global_step}{of_steps}"


def _numbers(metrics: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Return `name value` of the metrics under a prefix, without the copies that Lightning adds per step and epoch."""
    for name, value in metrics.items():
        is_copy = name.endswith(("_step", "_epoch")) and name.rpartition("_")[0] in metrics
        if name.startswith(prefix) and name not in _RATES and not is_copy:
            yield f"{name} {float(value):.4g}"


def _learning_rates(trainer: L.Trainer) -> str:
    """Return the different learning rates of the parameter groups that train, in their order."""
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if not rates:
        return ""
    return "lr " + "/".join(dict.fromkeys(f"{float(rate):.3g}" for rate in rates))


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
