"""A callback that records a trial, and measures it while the model is on its device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import lightning as L

from lora_lightning.commands._compare import measure
from lora_lightning.commands._compare.records import Result
from lora_lightning.tasks import AdapterTask

_SETTLING_STEPS = 3
"""Number of first steps, which are slower and do not count for the time of a step."""


class Recorder(L.Callback):
    """Records losses, times and memory of a fit, and the figures of the model after it.

    Args:
        measures: Whether to measure memory and inference too, or losses and times alone.
    """

    def __init__(self, *, measures: bool) -> None:
        self.measures = measures
        self.losses: list[list[float | None]] = []
        self.validations: list[dict[str, Any]] = []
        self.step_seconds: list[float] = []
        self.figures: Result = {}
        self.notes: list[str] = []
        self._batch: Any = None
        self._started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and count memory from here."""
        del trainer, pl_module
        measure.reset_peak()
        self.figures["memory_at_start"] = measure.peak_memory()

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401 - the data module's own type
        batch_idx: int,
    ) -> None:
        """Keep the first batch, and start the step's clock."""
        del trainer, pl_module, batch_idx
        if self._batch is None:
            self._batch = batch
        measure.wait()
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own type
        batch: Any,  # noqa: ANN401 - the data module's own type
        batch_idx: int,
    ) -> None:
        """Record the step's loss, time and memory."""
        del outputs, batch, batch_idx
        measure.wait()
        self.step_seconds.append(time.perf_counter() - self._started)
        loss = trainer.callback_metrics.get("train/loss")
        self.losses.append([trainer.global_step, None if loss is None else finite(loss)])
        self.figures["peak_memory"] = measure.peak_memory()
        if self.measures:  # here, since a validation drops the gradients
            self.figures["optimizer_bytes"] = measure.optimizer_bytes(trainer.optimizers, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record loss and metrics of a validation."""
        del pl_module
        if trainer.sanity_checking:
            return
        found = {name.removeprefix("val/"): finite(value) for name, value in metrics_of(trainer, "val/").items()}
        self.validations.append({"step": trainer.global_step, **found})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum the times up, and measure what a forward pass keeps."""
        assert isinstance(pl_module, AdapterTask)
        self.figures["train_seconds"] = sum(self.step_seconds)
        settled = sorted(self.step_seconds[_SETTLING_STEPS:] or self.step_seconds)
        if settled:
            self.figures["step_seconds"] = settled[len(settled) // 2]
        if self.measures:
            self._try("saved_bytes", trainer, lambda: self._saved(pl_module))

    def on_test_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401 - the data module's own type
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch if nothing was trained."""
        del trainer, pl_module, batch_idx, dataloader_idx
        if self._batch is None:
            self._batch = batch

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure inference."""
        assert isinstance(pl_module, AdapterTask)
        if self.measures and self._batch is not None:
            self._try("inference_overhead", trainer, lambda: self._overhead(pl_module))

    def _saved(self, task: AdapterTask) -> int:
        batch = task.transfer_batch_to_device(self._batch, task.device, 0)
        with measure.in_mode(task, training=True):
            return measure.saved_for_backward(task.adapted, lambda: task.compute_loss(batch).loss)

    def _overhead(self, task: AdapterTask) -> float:
        batch = task.transfer_batch_to_device(self._batch, task.device, 0)
        with measure.in_mode(task, training=False):
            return measure.inference_overhead(task.adapted, lambda: task.compute_loss(batch))

    def _try(self, name: str, trainer: L.Trainer, measured: Callable[[], float]) -> None:
        """Take one measurement; if a task cannot be called outside its steps, only this figure is missing."""
        try:
            with trainer.precision_plugin.forward_context():
                self.figures[name] = measured()
        except Exception as error:  # whatever a task of somebody's own raises there
            self.notes.append(f"{name} not measured ({type(error).__name__}: {' '.join(str(error).split()):.100})")


def metrics_of(trainer: L.Trainer, prefix: str) -> dict[str, Any]:
    """Return the logged values whose names start with a prefix."""
    return {name: value for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def finite(value: Any) -> float | None:  # noqa: ANN401 - a number or a tensor with one
    """Return a number, or None if it is not finite or missing."""
    number = float(value)
    return number if math.isfinite(number) else None
