"""Let methods act around the optimizer steps of a LightningModule that exists, whichever optimizers it has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import nn

from lora_lightning.adapters import Method, iter_roles
from lora_lightning.finetuning.record import Part


class MethodSteps:
    """Calls `before_step` and `after_step` of methods for the optimizers that hold their adapters.

    Each part counts its own steps: with two optimizers `trainer.global_step` counts those of both.

    Args:
        module: The module, with its parts.
        part: The part whose methods act.
        trainer: Its Trainer.
    """

    def __init__(self, module: nn.Module, part: Part, trainer: L.Trainer) -> None:
        self._trainer, self._part = trainer, part
        self._model = part.submodule(module)
        acting = [method for method in part.methods if _acts_on_steps(method)]
        self._holding = holding_optimizers(self._model, trainer.optimizers) if acting else []
        self._handles = [optimizer.register_step_post_hook(partial(_after, self)) for optimizer in self._holding]

    def end(self) -> None:
        """Take the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the methods act on the gradients of an optimizer that is about to step."""
        if not any(optimizer is other for other in self._holding):
            return
        for method in self._part.methods:
            method.before_step(self._model, self._part.num_steps, self._total)

    def after(self) -> None:
        """Let the methods act on the updated adapters, and count the step."""
        for method in self._part.methods:
            method.after_step(self._model, self._part.num_steps, self._total)
        self._part.num_steps += 1

    @property
    def _total(self) -> int:
        """The steps of this part's optimizer in the whole run, or -1 if that is unknown."""
        total = self._trainer.estimated_stepping_batches
        if total == float("inf"):
            return -1
        is_shared = self._trainer.max_steps == total and not self._trainer.lightning_module.automatic_optimization
        return int(total) // len(self._trainer.optimizers) if is_shared else int(total)


def holding_optimizers(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Return the optimizers that hold a trainable adapter parameter of a model."""
    adapters = {id(parameter) for _, parameter, _ in iter_roles(model) if parameter.requires_grad}
    return [
        optimizer
        for optimizer in optimizers
        if any(id(parameter) in adapters for group in optimizer.param_groups for parameter in group["params"])
    ]


def _acts_on_steps(method: Method) -> bool:
    cls = type(method)
    return cls.before_step is not Method.before_step or cls.after_step is not Method.after_step


def _after(steps: MethodSteps, *_: Any) -> None:  # noqa: ANN401 - torch's own signature
    steps.after()
