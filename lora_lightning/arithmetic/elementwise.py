"""Sums that look at every element of the updates: TIES and DARE. One layer is dense at a time, in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_lightning.arithmetic.factors import Factors


def ties(updates: Sequence[Tensor], density: float) -> Tensor:
    """Return the TIES sum of dense updates (Yadav et al. 2023, arXiv 2306.01708, section 4).

    Of each update, the elements with the largest magnitudes are kept; of each element, the sign with the larger total
    is elected; the result is the mean of the updates that kept the element with this sign.

    Args:
        updates: The updates of one layer, weights included, of one shape.
        density: Share of the elements of each update that is kept, in (0, 1].

    Example:
        >>> ties([torch.tensor([3.0, -1.0]), torch.tensor([-1.0, -3.0])], density=1.0).tolist()
        [3.0, -2.0]
    """
    kept = [_largest(update, density) for update in updates]
    elected = torch.where(torch.stack(kept).sum(0) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
    for update in kept:
        agrees = update.sign() == elected
        total += update * agrees
        count += agrees
    return total / count.clamp_min(1)


def _largest(update: Tensor, density: float) -> Tensor:
    """Set all but the elements with the largest magnitudes to zero; at least one is kept."""
    count = max(int(density * update.numel()), 1)
    indices = update.abs().flatten().topk(count).indices
    kept = torch.zeros_like(update).flatten()
    kept[indices] = update.flatten()[indices]
    return kept.view_as(update)


def drop_and_rescale(update: Tensor, density: float, seed: int) -> Tensor:
    """Keep each element with a probability and divide it by that, as DARE does (arXiv 2311.03099, section 3.2).

    Args:
        update: A dense update.
        density: The probability of keeping an element, in (0, 1].
        seed: Seed of the draw; torch's global generator is left alone.

    Example:
        >>> drop_and_rescale(torch.ones(1000), 0.5, seed=0).unique().tolist()
        [0.0, 2.0]
    """
    generator = torch.Generator().manual_seed(seed)
    is_kept = torch.rand(update.shape, generator=generator, dtype=torch.float64) < density
    return update * is_kept / density


def seed_of(seed: int, adapter: str, path: str) -> int:
    """Return the seed of one adapter's draw at one layer; it does not depend on the order of either."""
    digest = hashlib.sha256(f"{seed}\0{adapter}\0{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def dense_sum(
    updates: Mapping[str, Factors], path: str, *, drops: bool, elects: bool, density: float, seed: int
) -> Tensor:
    """Return the sum of one layer's updates, dense.

    Args:
        updates: By the adapters' names, weights included.
        path: The layer's path.
        drops: Whether elements are dropped at random (DARE); with `elects` alone, the smallest are (TIES).
        elects: Whether a sign is elected for each element (TIES).
        density: Share of the elements that is kept.
        seed: Seed of the draws.

    Returns:
        `[..., out, in]`.
    """
    dense = {name: update.dense() for name, update in updates.items()}
    if drops:
        dense = {name: drop_and_rescale(one, density, seed_of(seed, name, path)) for name, one in dense.items()}
    if elects:
        return ties(list(dense.values()), 1.0 if drops else density)
    return torch.stack(list(dense.values())).sum(0)
