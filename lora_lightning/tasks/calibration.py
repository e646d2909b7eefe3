"""Calibration of methods on the training data, once, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
from torch import Tensor, nn

from lora_lightning.adapters import Method
from lora_lightning.tasks.backward import offloaded

if TYPE_CHECKING:
    from lora_lightning.tasks.base import AdapterTask


def calibrate_once(task: AdapterTask) -> None:
    """Calibrate a task's methods if a fit is about to begin and they are not calibrated yet."""
    if task._is_calibrated or task.model is None or task._trainer is None or task.trainer.state.fn != "fit":
        return
    task._is_calibrated = True
    calibrating = [method for method in task.methods if method.calibrates]
    calibrate(task, task.adapted, calibrating, offloaded(task, lambda batch: task.compute_loss(batch).loss))


def calibrate(
    module: L.LightningModule, model: nn.Module, methods: Sequence[Method], loss: Callable[[Any], Tensor]
) -> None:
    """Calibrate each method on the training batches; no gradients remain.

    Args:
        module: The module that its Trainer trains.
        model: The adapted model.
        methods: The methods that calibrate; may be empty.
        loss: Takes a batch on the module's device.
    """
    if not methods:
        return
    module.trainer.fit_loop.setup_data()
    for method in methods:
        method.calibrate(model, _batches(module), loss)
    model.zero_grad()


def _batches(module: L.LightningModule) -> Iterator[Any]:
    loader: Iterable[Any] = module.trainer.train_dataloader  # type: ignore[assignment]  # Lightning types it as Any
    for batch in loader:
        yield module.transfer_batch_to_device(batch, module.trainer.strategy.root_device, 0)
