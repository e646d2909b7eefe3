"""Stops a run whose loss or gradients are no longer finite, before they reach the weights."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lora_lightning.callbacks.gradients import finite_flag, largest, local, names_of, optimized, over_ranks, quoted
from lora_lightning.errors import ConfigError, TrainingError
from lora_lightning.keywords import NamesNearest

__all__ = ["NonFiniteGuard"]


class NonFiniteGuard(NamesNearest, L.Callback):
    """Stop before an update by a loss or gradient that is NaN or infinite, and at such a validation loss.

    Weights and checkpoints stay those of the last good step. Losses and gradients of a step are checked together, on
    the device, by five small operations. The host waits for the result once per optimizer step (not per accumulated
    batch), since an update cannot be undone. All ranks use the same result.

    A gradient scaler (`precision: 16-mixed`) finds its scale by infinite gradients, and skips such steps itself. With a
    scaler, only a NaN loss, or too many skipped steps in a row, ends the run.

    Args:
        max_skipped_steps: Maximum number of steps in a row that a gradient scaler may skip; each halves its scale.

    Raises:
        ConfigError: `max_skipped_steps` is below 0.
        TrainingError: The run is stopped.
    """

    def __init__(self, max_skipped_steps: int = 25) -> None:
        if max_skipped_steps < 0:
            raise ConfigError(f"NonFiniteGuard: max_skipped_steps must be at least 0, got {max_skipped_steps}.")
        self.max_skipped_steps = max_skipped_steps
        self._losses: list[Tensor] = []
        self._num_skipped = 0
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the state of an earlier run."""
        del pl_module
        self._losses, self._num_skipped, self._first_step = [], 0, trainer.global_step

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keep the loss of a batch until the gradients are computed."""
        del trainer, pl_module
        loss = local(loss.detach())
        self._losses.append(loss.sum() if loss.dim() else loss)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the step's losses and gradients."""
        losses, self._losses = self._losses, []
        sizes = largest(parameter.grad for parameter in optimized(optimizer) if parameter.grad is not None)
        if not sizes and not losses:
            return
        if over_ranks(trainer, finite_flag([*sizes, *losses]), dist.ReduceOp.SUM).item() == 0:
            self._num_skipped = 0
        else:
            self._judge(trainer, pl_module, optimizer, losses)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop if a validation loss is not finite, before any checkpoint of that validation."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        broken = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.endswith("loss") and not name.startswith("train") and not math.isfinite(value)
        }
        if not trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
            return
        what = " and ".join(f"{name} is {value}" for name, value in broken.items())
        raise TrainingError(
            f"Training stopped after optimizer step {trainer.global_step}: "
            f"{what or 'a loss of another rank is not finite'}. {checkpoint_kept(trainer)} Look for empty or broken "
            f"rows in the validation data, lower {_rate_of(pl_module)}, or train in another precision."
        )

    def _judge(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer, losses: list[Tensor]
    ) -> None:
        """Raise, unless a gradient scaler will skip this step."""
        values = [float(loss) for loss in losses]
        decide = trainer.strategy.reduce_boolean_decision
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if is_scaled and not decide(any(map(math.isnan, values)), all=False):
            self._num_skipped += 1
            if self._num_skipped <= self.max_skipped_steps:
                return
        raise TrainingError(
            f"Training stopped before optimizer step {trainer.global_step + 1}{self._skipped()}: "
            f"{self._findings(module, optimizer, values)}; learning rate {_rates(optimizer)}. "
            f"{checkpoint_kept(trainer)} {self._advice(trainer, module)}"
        )

    def _findings(self, module: L.LightningModule, optimizer: torch.optim.Optimizer, values: list[float]) -> str:
        """Describe which losses and gradients of this rank are not finite."""
        names, parameters = names_of(module), optimized(optimizer)
        with_gradient = [(parameter, local(parameter.grad)) for parameter in parameters if parameter.grad is not None]
        broken = [names.get(id(p), "?") for p, gradient in with_gradient if not torch.isfinite(gradient).all()]
        found = [f"the loss is {value}" for value in values if not math.isfinite(value)][:1]
        if broken:
            found.append(f"the gradients of {len(broken)} of {len(parameters)} parameters are not ({quoted(broken)})")
            if len(found) == 1:
                found = [f"the loss is finite, but {found[0]}"]
        return " and ".join(found) or "a loss or gradient of another rank is not finite"

    def _skipped(self) -> str:
        return f", after {self._num_skipped} left out by the gradient scaler in a row" if self._num_skipped else ""

    def _advice(self, trainer: L.Trainer, module: L.LightningModule) -> str:
        batch = f"epoch {trainer.current_epoch}, batch {trainer.fit_loop.epoch_loop.batch_idx}"
        if self._num_skipped:
            return "Train with trainer.precision bf16-mixed or 32-true, whose range is wider."
        if trainer.global_step == self._first_step:
            return (
                f"No step was taken before it, so look for NaN in the data ({batch}), or for a base model whose values "
                "its precision does not hold (trainer.precision bf16-mixed or 32-true)."
            )
        warm_up = "warm up longer (optim.warmup)" if _has_optim(module) else "warm up longer"
        clip = "clip with trainer.gradient_clip_val" if module.automatic_optimization else "clip gradients"
        return f"Lower {_rate_of(module)}, {warm_up} or {clip}, and look for broken rows in the data ({batch})."


def _has_optim(module: L.LightningModule) -> bool:
    """Return whether a module is a task of this library, whose learning rates are settings."""
    return hasattr(module, "optim")


def _rate_of(module: L.LightningModule) -> str:
    return "model.init_args.optim.lr" if _has_optim(module) else "the learning rate"


def checkpoint_kept(trainer: L.Trainer) -> str:
    """Name the last good checkpoint in a sentence."""
    callbacks: list[Any] = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    paths = [path for one in callbacks for path in (one.last_model_path, one.best_model_path) if path]
    return f"The last good checkpoint is {paths[0]}." if paths else "No checkpoint had been saved yet."


def _rates(optimizer: torch.optim.Optimizer) -> str:
    rates = dict.fromkeys(f"{float(group['lr']):g}" for group in optimizer.param_groups)
    return " and ".join(rates)
