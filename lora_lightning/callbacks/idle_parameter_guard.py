"""Names adapter parameters that do not learn, early in a run."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lora_lightning.callbacks.gradients import bit_sum, largest, local, over_ranks, quoted, trained
from lora_lightning.callbacks.places import adapted_model
from lora_lightning.errors import ConfigError

__all__ = ["IdleParameterGuard"]


class IdleParameterGuard(L.Callback):
    """Warn, once, of adapter parameters without a gradient in the first steps, or still exactly at their start.

    Only what trains is judged; biases of attention's keys, whose gradient is zero by nature, are not. After those steps
    the guard does nothing more. A host that no forward pass calls is an error already in the first batch (see
    `AdapterTask`); a run that is shorter than `num_steps` is not judged.

    Args:
        num_steps: Optimizer steps to watch; at least 2, since LoRA's A has no gradient in the first one.

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
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take note of where the parameters start."""
        model = adapted_model(pl_module)
        self._watched = [] if model is None else trained(model)
        self._first_step = trainer.global_step
        if self._watched:
            self._start = self._position()
            self._largest = torch.zeros(len(self._watched), device=self._start.device)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take note of which parameters have a gradient."""
        del trainer, pl_module, optimizer
        gradients = {
            index: gradient
            for index, (_, parameter) in enumerate(self._watched)
            if (gradient := parameter.grad) is not None and local(gradient).numel()
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
        """Judge after the first steps."""
        del pl_module, outputs, batch, batch_idx
        if self._watched and trainer.global_step - self._first_step >= self.num_steps:
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

    def _position(self) -> Tensor:
        """Return a sum over each watched parameter's bits, `[parameters]`."""
        return torch.stack([bit_sum(parameter) for _, parameter in self._watched])
