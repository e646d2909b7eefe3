"""What a rank holds of an optimizer step that awaits more batches: gradients, and what a task has counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lora_lightning.adapters.sharded import is_shard


class PendingGradients:
    """Knows which gradients await a step in a module that optimizes manually, with one optimizer or several.

    There neither the number of batches nor whether a gradient is there tells: a module accumulates as it likes, and
    many leave the gradients of a finished step until the next one begins. A gradient is pending if backward has added
    to it since its optimizer's last step.

    Args:
        optimizers: Those of the Trainer.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._pending: set[int] = set()
        trained: dict[int, Any] = {
            id(one): one for optimizer in optimizers for one in _parameters(optimizer) if one.requires_grad
        }
        self._handles = [parameter.register_post_accumulate_grad_hook(self._note) for parameter in trained.values()]
        self._handles += [optimizer.register_step_post_hook(self._settle) for optimizer in optimizers]

    def of(self, module: L.LightningModule) -> set[str]:
        """Return the names of a module's parameters whose gradients are pending."""
        return {name for name, parameter in module.named_parameters() if id(parameter) in self._pending}

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Count the gradients of these parameters as pending."""
        self._pending |= {id(parameter) for parameter in parameters}

    def end(self) -> None:
        """Take the hooks off parameters and optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, parameter: Tensor) -> None:
        self._pending.add(id(parameter))

    def _settle(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:  # noqa: ANN401 - torch's own signature
        self._pending -= {id(parameter) for parameter in _parameters(optimizer)}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def unfinished_state(module: L.LightningModule, names: set[str] | None = None) -> dict[str, Any]:
    """Return a rank's gradients by parameter, on the CPU, and what the module's `unfinished_step` returns.

    Args:
        module: The module.
        names: The parameters whose gradients to take; None takes all that train.
    """
    gradients = {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and (parameter.requires_grad if names is None else name in names)
    }
    if any(map(is_shard, gradients.values())):
        rank_zero_warn(
            "The checkpoint is written between the batches of one optimizer step, and the model is sharded: the "
            "gradients of these batches are not in it. Save at the end of a step to resume exactly."
        )
        gradients = {}
    count: Any = getattr(module, "unfinished_step", None)
    return {
        "gradients": {name: gradient.detach().cpu() for name, gradient in gradients.items()},
        "module": count() if callable(count) else {},
    }


def load_unfinished(
    module: L.LightningModule, by_rank: list[dict[str, Any] | None], rank: int, world_size: int
) -> list[Tensor]:
    """Give a rank back what it held; on another number of ranks, each gets its share of what all held.

    Args:
        module: The module, which may define `load_unfinished_step(state)` and say by `sums_gradients` that the
            gradients of the ranks are added, not averaged.
        by_rank: What `unfinished_state` returned on each rank.
        rank: This process's rank.
        world_size: The number of ranks now.

    Returns:
        The parameters whose gradients were given back.
    """
    held = [one for one in by_rank if one is not None]
    if len(by_rank) == world_size and len(held) == world_size:
        gradients, counted = held[rank]["gradients"], held[rank]["module"]
    else:
        per_rank = world_size if getattr(module, "sums_gradients", False) else len(held)
        names = {name for one in held for name in one["gradients"]}
        gradients = {name: _sum(one["gradients"].get(name) for one in held) / per_rank for name in names}
        counted = {key: _sum(one["module"][key] for one in held) for key in held[0]["module"]} if rank == 0 else {}
    given = [(name, parameter) for name, parameter in module.named_parameters() if name in gradients]
    for name, parameter in given:
        parameter.grad = gradients[name].to(parameter)
    take: Any = getattr(module, "load_unfinished_step", None)
    if counted and callable(take):
        take(counted)
    return [parameter for _, parameter in given]


def _sum(values: Any) -> Any:  # noqa: ANN401 - tensors or numbers
    total: Tensor | float = 0
    for value in values:
        if value is not None:
            total = torch.add(value, total) if isinstance(value, Tensor) else total + value
    return total
