"""What a rank holds of an optimizer step that awaits more batches: gradients, and what a task has counted."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lora_lightning.adapters.sharded import is_shard


def unfinished_state(module: L.LightningModule) -> dict[str, Any]:
    """Return a rank's gradients by parameter, on the CPU, and what the module's `unfinished_step` returns."""
    gradients = {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    if any(map(is_shard, gradients.values())):
        rank_zero_warn(
            "The checkpoint is written between the batches of one optimizer step, and the model is sharded: the "
            "gradients of these batches are not in it. Save at the end of a step to go on exactly."
        )
        gradients = {}
    count: Any = getattr(module, "unfinished_step", None)
    return {
        "gradients": {name: gradient.detach().cpu() for name, gradient in gradients.items()},
        "module": count() if callable(count) else {},
    }


def load_unfinished(
    module: L.LightningModule, by_rank: list[dict[str, Any] | None], rank: int, world_size: int
) -> None:
    """Give a rank back what it held; on another number of ranks, each gets its share of what all held.

    Args:
        module: The module, which may define `load_unfinished_step(state)` and say by `sums_gradients` that the
            gradients of the ranks are added, not averaged.
        by_rank: What `unfinished_state` returned on each rank.
        rank: This process's rank.
        world_size: The number of ranks now.
    """
    held = [one for one in by_rank if one is not None]
    if len(by_rank) == world_size and len(held) == world_size:
        gradients, counted = held[rank]["gradients"], held[rank]["module"]
    else:
        per_rank = world_size if getattr(module, "sums_gradients", False) else len(held)
        names = {name for one in held for name in one["gradients"]}
        gradients = {name: _sum(one["gradients"].get(name) for one in held) / per_rank for name in names}
        counted = {key: _sum(one["module"][key] for one in held) for key in held[0]["module"]} if rank == 0 else {}
    for name, parameter in module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)
    take: Any = getattr(module, "load_unfinished_step", None)
    if counted and callable(take):
        take(counted)


def _sum(values: Any) -> Any:  # noqa: ANN401 - tensors or numbers
    total: Tensor | float = 0
    for value in values:
        if value is not None:
            total = torch.add(value, total) if isinstance(value, Tensor) else total + value
    return total
