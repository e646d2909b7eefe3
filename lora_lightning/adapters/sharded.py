"""The one place that tells tensors that are spread over processes from whole ones."""

from __future__ import annotations

from torch import Tensor, nn


def is_shard(tensor: Tensor) -> bool:
    """Return whether a tensor is spread over processes (a `DTensor`), so that this one holds a part of it.

    Example:
        >>> import torch
        >>> is_shard(torch.ones(2))
        False
    """
    return hasattr(tensor, "device_mesh")


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are spread over processes, none of which holds all of them."""
    return any(map(is_shard, model.parameters()))
