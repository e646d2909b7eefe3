"""Serve an adapter whose components are in the order of their singular values at fewer ranks than it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods.expert_lora import ExpertLoRAAdapter
from lora_lightning.methods.low_rank import LowRankAdapter
from lora_lightning.methods.parameter_lora import ParameterLoRAAdapter

__all__ = ["at_rank"]

_TOLERANCE = 1e-3


@contextmanager
def at_rank(model: nn.Module, rank: int) -> Iterator[None]:
    """Have the adapters of a model answer with their first `rank` components inside the block.

    For adapters that `shrink` or `combine` wrote with a cut, whose components are in the order of their singular
    values: the first k of them are the best update of rank k. Nothing is copied. Use it to answer, not to train: an
    optimizer does not know the shorter factors.

    Args:
        model: A model with one adapter of LoRA, loaded from such a folder.
        rank: From 1; layers of a lower rank answer as they are.

    Raises:
        ConfigError: `rank` is not a whole number from 1, or the components are not in that order.
        TargetError: The model has no adapters of LoRA.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank is {rank!r}; it must be a whole number from 1.")
    pairs = [(path, adapter, *names) for path, _, adapter in iter_adapters(model) for names in _pairs(adapter)]
    if not pairs:
        raise TargetError("The model has no adapters of LoRA to answer at another rank; load one with load_peft.")
    for path, adapter, _, name_b in pairs:
        _check_order(path, getattr(adapter, name_b))
    whole = [(adapter, name, getattr(adapter, name)) for _, adapter, *names in pairs for name in names]
    try:
        for adapter, name, tensor in whole:
            part = tensor.detach()[..., :rank, :] if name.endswith("lora_A") else tensor.detach()[..., :rank]
            setattr(adapter, name, nn.Parameter(part, requires_grad=False))
        yield
    finally:
        for adapter, name, tensor in whole:
            setattr(adapter, name, tensor)


def _pairs(adapter: nn.Module) -> list[tuple[str, str]]:
    """Return the names of A and B of a plain LoRA adapter; of one on parameters, several."""
    if type(adapter) is LowRankAdapter and adapter.start_a is None:
        return [("lora_A", "lora_B")]
    if isinstance(adapter, ExpertLoRAAdapter | ParameterLoRAAdapter):
        return [(f"{name}_lora_A", f"{name}_lora_B") for name in adapter.ranks]
    return []


@torch.no_grad()
def _check_order(path: str, b: Tensor) -> None:
    """Refuse a B whose columns are not orthogonal, the longest first: then its first ones are not the best update.

    Raises:
        ConfigError: They are not.
    """
    wide = b.double()
    gram = wide.mT @ wide
    squares = gram.diagonal(dim1=-2, dim2=-1)
    slack = _TOLERANCE * squares.amax(-1, keepdim=True)
    is_diagonal = bool(((gram - torch.diag_embed(squares)).abs() <= slack[..., None]).all())
    is_ordered = bool((squares.diff(dim=-1) <= slack).all())
    if not (is_diagonal and is_ordered):
        raise ConfigError(
            f"The components of {path!r} are not in the order of their singular values, so its first ones are not the "
            "best update of their rank. Write the adapter with shrink(..., nested=...) first."
        )
