"""Training throughput in samples and tokens a second."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor

from lora_lightning.callbacks.places import passed_interval
from lora_lightning.checks.monitors import Direction

__all__ = ["Throughput"]


class Throughput(L.Callback):
    """Log `train/samples_per_second` and `train/tokens_per_second`, summed over all ranks.

    Both are means since the last log, at the trainer's `log_every_n_steps`, without the time of validation. Tokens are
    those in `attention_mask`, so padding does not count; for a batch without a mask only samples are logged. The counts
    stay on the device between logs: reading them would synchronize the host in every step.
    """

    def __init__(self) -> None:
        self._num_samples = 0
        self._num_tokens: Tensor | None = None
        self._started = 0.0
        self._paused_at: float | None = None
        self._last_step = 0

    def logged_metrics(self) -> dict[str, Direction | None]:
        """Return what is logged."""
        return {"train/samples_per_second": "max", "train/tokens_per_second": "max"}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        del pl_module
        self._restart()
        self._last_step = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock while validation runs."""
        del trainer, pl_module
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restart the clock."""
        del trainer, pl_module
        if self._paused_at is not None:
            self._started += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Count the batch, and log at the trainer's interval."""
        del outputs, batch_idx
        self._num_samples += count_samples(batch)
        num_tokens = count_tokens(batch)
        if num_tokens is not None:
            self._num_tokens = num_tokens if self._num_tokens is None else self._num_tokens + num_tokens
        if not passed_interval(trainer, self._last_step):
            return
        self._last_step = trainer.global_step
        self._log(pl_module)
        self._restart()

    def _log(self, pl_module: L.LightningModule) -> None:
        counts = {"train/samples_per_second": float(self._num_samples)}
        if self._num_tokens is not None:
            counts["train/tokens_per_second"] = float(self._num_tokens.item())  # waits for the device; then the clock
        seconds = max(time.perf_counter() - self._started, 1e-9)
        for name, count in counts.items():
            pl_module.log(
                name, count / seconds, on_step=True, on_epoch=False, sync_dist=True, reduce_fx="sum", batch_size=1
            )

    def _restart(self) -> None:
        self._num_samples, self._num_tokens = 0, None
        self._started = time.perf_counter()


def count_samples(batch: Any) -> int:  # noqa: ANN401 - a batch of any shape
    """Return the length of the first tensor in a batch (a tensor, or a mapping or sequence of tensors), 0 without one.

    Example:
        >>> import torch
        >>> count_samples({"input_ids": torch.zeros(4, 7), "labels": torch.zeros(4)})
        4
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    if isinstance(batch, str):
        return 0
    return next((count for count in map(count_samples, parts) if count), 0)


def count_tokens(batch: Any) -> Tensor | None:  # noqa: ANN401 - a batch of any shape
    """Return the number of tokens in a batch without padding, as a tensor on its device, or None without a mask.

    Example:
        >>> import torch
        >>> count_tokens({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
        tensor(5)
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.sum() if isinstance(mask, Tensor) else None
