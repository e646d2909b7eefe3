"""Names adapter parameters that do not learn, early in a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lora_lightning.callbacks.gradients import bit_sum, largest, local, optimized, over_ranks, quoted, trained
from lora_lightning.callbacks.places import adapted_model
from lora_lightning.errors import ConfigError
from lora_lightning.keywords import NamesNearest

__all__ = ["IdleParameterGuard"]


class IdleParameterGuard(NamesNearest, L.Callback):
    """Warn, once, of adapter parameters without a gradient in the first steps, or still exactly at their start.

    It checks trained parameters, except biases of attention keys, whose gradient is zero by construction. After those
    steps the guard does nothing. A host that no forward pass calls is already an error in the first batch (see
    `AdapterTask`); a run shorter than `num_steps` is not checked.

    Args:
        num_steps: Steps to watch, of each optimizer that holds adapters; at least 2, since LoRA's A has no gradient in
            the first one.

    Raises:
        ConfigError: `num_steps` is below 2.
    """

    def __init__(self, num_steps: int = 10) -> None:
        if num_steps < 2:
            raise ConfigError(
                f"IdleParameterGuard: num_steps must be at least 2 (LoRA's A has no gradient in the first step), "
                f"got {num_steps}."
            )
        self.num_steps = num_steps
        self._watched: list[tuple[str, Tensor]] = []
        self._largest = torch.empty(0)
        self._start = torch.empty(0)
        self._num_steps: dict[int, int] = {}  # by optimizer
        self._indices: dict[int, list[int]] = {}  # the watched parameters to look at when it steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the initial parameters."""
        model = adapted_model(pl_module)
        self._watched = [] if model is None else trained(model)
        self._indices = self._indices_by_optimizer(trainer.optimizers)
        self._num_steps = dict.fromkeys(self._indices, 0)
        if self._watched:
            self._start = self._position()
            self._largest = torch.zeros(len(self._watched), device=self._start.device)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record which parameters of an optimizer have a gradient.

        Parameters of other optimizers may have the gradient of another loss.
        """
        del trainer, pl_module
        if not self._watched or id(optimizer) not in self._indices:
            return
        self._num_steps[id(optimizer)] += 1
        gradients = {
            index: gradient
            for index in self._indices[id(optimizer)]
            if (gradient := self._watched[index][1].grad) is not None and local(gradient).numel()
        }
        if gradients:
            sizes = torch.stack(largest(gradients.values())).to(self._largest)
            indices = torch.tensor(list(gradients), device=self._largest.device)
            self._largest[indices] = torch.maximum(self._largest[indices], sizes)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Check after the first steps."""
        del pl_module, outputs, batch, batch_idx
        if self._watched and min(self._num_steps.values(), default=0) >= self.num_steps:
            self._judge(trainer)
            self._watched = []

    def _judge(self, trainer: L.Trainer) -> None:
        names = [name for name, _ in self._watched]
        facts = torch.stack([self._largest != 0, self._position() != self._start]).int()
        has_gradient, has_moved = over_ranks(trainer, facts).bool().tolist()
        idle = [name for name, has in zip(names, has_gradient, strict=True) if not has]
        if idle:
            rank_zero_warn(
                f"{len(idle)} of {len(names)} trained adapter parameters had no gradient in the first {self.num_steps} "
                f"optimizer steps: {quoted(idle)}. The loss does not depend on them, so they learn nothing; leave "
                "their modules out with exclude_modules, or check compute_loss for a detach or a no_grad."
            )
        stuck = [n for n, has, moved in zip(names, has_gradient, has_moved, strict=True) if has and not moved]
        if stuck:
            rank_zero_warn(
                f"{len(stuck)} of {len(names)} trained adapter parameters are exactly where they started after "
                f"{self.num_steps} optimizer steps, though they have a gradient: {quoted(stuck)}. The optimizer does "
                "not hold them, or its learning rate for them (model.init_args.optim) is 0 or too small for their "
                "precision."
            )

    def _indices_by_optimizer(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[int, list[int]]:
        """Return which of the watched parameters each optimizer holds, with those that none holds.

        An optimizer without watched parameters is omitted, unless no optimizer has any.
        """
        held = {id(optimizer): {id(parameter) for parameter in optimized(optimizer)} for optimizer in optimizers}
        watched = [id(parameter) for _, parameter in self._watched]
        stray = [index for index, key in enumerate(watched) if not any(key in keys for keys in held.values())]
        found = {
            optimizer: [index for index, key in enumerate(watched) if key in keys] for optimizer, keys in held.items()
        }
        holding = {optimizer: indices for optimizer, indices in found.items() if indices} or found
        return {optimizer: indices + stray for optimizer, indices in holding.items()}

    def _position(self) -> Tensor:
        """Return a sum over each watched parameter's bits, `[parameters]`."""
        return torch.stack([bit_sum(parameter) for _, parameter in self._watched])
